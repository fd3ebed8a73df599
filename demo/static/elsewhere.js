// Calls the operation `echo` at another origin and watches its job there.

const { api, rpc, client } = document.getElementById("main").dataset;
const [form, section, place, answer, cancel, said] = ["call", "job", "place", "answer", "cancel", "said"].map(
  (id) => document.getElementById(id),
);
let calls = 0;
let looks;
let job;

await import(client); // defines <async-job>
form.hidden = false;

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  answer.textContent = "";
  try {
    job = await call("echo", { text: form.elements.text.value });
    show();
  } catch (error) {
    answer.textContent = error.message;
  }
  section.hidden = false;
});

cancel.addEventListener("click", () => {
  call("async.cancel", { jobID: job.jobID }).catch((error) => (answer.textContent = error.message));
});

function show() {
  looks = 0;
  const element = document.createElement("async-job");
  // Its own button would send DELETE, which wants the token of a form.
  element.setAttribute("no-cancel", "");
  element.src = new URL(job.links[0].href, api).href;
  place.replaceChildren(element);
  cancel.hidden = false;
}

place.addEventListener("jobchange", ({ detail: { status, progress } }) => {
  looks += 1;
  say(`← ${status}${progress === undefined ? "" : `, ${progress} %`}`);
});

place.addEventListener("jobdone", ({ detail: { status, result } }) => {
  const asked = `The page asked ${looks} times.`;
  answer.textContent = status === "successful" ? `The answer: “${result}”. ${asked}` : asked;
  if (document.activeElement === cancel) section.focus();
  cancel.hidden = true;
});

/** Return the result of a JSON-RPC call, or throw its error. */
async function call(method, params) {
  calls += 1;
  const body = JSON.stringify({ jsonrpc: "2.0", method, params, id: calls });
  say(`→ ${body}`);
  const response = await fetch(rpc, { method: "POST", headers: { "Content-Type": "application/json" }, body });
  const { result, error } = await response.json();
  if (error) throw new Error(error.message);
  say(`← job ${result.jobID}`);
  return result;
}

function say(text) {
  const line = document.createElement("li");
  line.textContent = text;
  said.append(line);
  document.getElementById("calls").hidden = false;
}
