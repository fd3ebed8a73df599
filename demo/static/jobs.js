// Keeps the list of jobs as the server has it: asks its list resource, and renders nothing itself.

const SECONDS = 5;
// Seconds after which an answer is taken for lost.
const PATIENCE = 20;
const list = document.getElementById("jobs");
const announcement = document.getElementById("announcement");
let busy = false;

addEventListener("jobdone", () => refresh());
addEventListener("visibilitychange", look);
follow();

/** Look every some seconds, and not again before there is an answer. */
async function follow() {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, SECONDS * 1000));
    await look();
  }
}

/** Ask for the list; the elements on the page follow their own jobs. */
async function look() {
  if (document.hidden) return;
  try {
    const response = await ask(list.dataset.url);
    if (!response.ok) return;
    const { jobs } = await response.json();
    const there = jobs.map((job) => `job-${job.jobID} ${job.done}`);
    const here = [...list.children].map((item) => `${item.id} ${item.dataset.done}`);
    // The timeline grows while something runs.
    if (there.join() !== here.join() || jobs.some((job) => !job.done)) await refresh();
  } catch {
    // The network is away; the next look comes.
  }
}

function ask(url) {
  return fetch(url, { signal: AbortSignal.timeout(PATIENCE * 1000) });
}

/** Take what changed from the page as the server renders it now. */
async function refresh() {
  if (busy) return;
  busy = true;
  try {
    const response = await ask(location.href);
    if (response.ok) update(new DOMParser().parseFromString(await response.text(), "text/html"));
  } catch {
    // The network is away; the next look comes.
  } finally {
    busy = false;
  }
}

function update(page) {
  const fresh = [...page.getElementById("jobs").children];
  const ids = new Set(fresh.map((item) => item.id));
  for (const item of [...list.children]) if (!ids.has(item.id)) item.remove();
  list.prepend(...fresh.filter((item) => !document.getElementById(item.id)));
  for (const item of fresh) replace(document.getElementById(item.id), item);
  for (const id of ["timeline", "empty"]) document.getElementById(id).replaceWith(page.getElementById(id));
}

function replace(old, item) {
  if (old === item || old.dataset.done === item.dataset.done) return;
  const focused = old.contains(document.activeElement);
  old.replaceWith(item);
  if (focused) item.focus();
  announcement.textContent = item.querySelector(".row").innerText;
}
