// In the end shows the server's own words for what became of the job.

const section = document.getElementById("job");
const announcement = document.getElementById("announcement");

section.addEventListener("jobchange", ({ detail: job }) => {
  if (job.done) return;
  const heading = `The job is ${job.status === "accepted" ? "waiting" : "running"}`;
  section.querySelector("h2").textContent = heading;
});

// Where that page cannot be had, the element has shown the end already.
section.addEventListener("jobdone", () => end().catch(() => {}));
// Where the job is gone the server's page says so.
section.addEventListener("joberror", ({ detail: error }) => {
  if (error.problem?.status === 404) location.reload();
});

// Replaces the section by the one that the server renders for the finished job.
async function end() {
  const page = await (await fetch(location.href)).text();
  const finished = new DOMParser().parseFromString(page, "text/html").getElementById("job");
  if (!finished?.hasAttribute("data-done")) return location.reload();
  const focused = section.contains(document.activeElement);
  section.replaceWith(finished);
  if (focused) finished.focus();
  announcement.textContent = finished.querySelector("h2").textContent;
}
