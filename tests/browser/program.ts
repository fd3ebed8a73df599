/** A small program against the declarations, checked and never run. */

import { cancel, JobProblem, start, watch, type Job } from "./client.js";

interface Rows {
  rows: number;
}

export async function run(form: HTMLFormElement): Promise<number> {
  const stop = new AbortController();
  const onProgress = (job: Job) => console.log(job.progress ?? 0, job.message?.trim());
  const onStart = (location: string) => sessionStorage.setItem("job", location);
  await start("/start", { body: new FormData(form), token: "x", onStart, signal: stop.signal });
  const { rows } = await start<Rows>("/start", { body: { a: [1, 2] }, onProgress });
  const again = await watch<Rows>(new URL("https://example.org/async/x"), { credentials: "include" });
  const last = await cancel("/async/x", { headers: { Authorization: "Bearer x" } });
  if (last.status === "dismissed") return 0;
  return rows + again.rows;
}

export function explain(error: unknown): string {
  if (!(error instanceof JobProblem)) return String(error);
  return error.problem.detail ?? `${error.problem.title} ${error.job?.jobID} ${error.retryAfter}`;
}

const element = document.createElement("async-job");
element.src = "/async/x";
element.addEventListener("jobdone", ({ detail }) => console.log(detail.status, element.job?.done));
document.addEventListener("jobchange", ({ detail }) => console.log(detail.progress?.toFixed()));
addEventListener("joberror", ({ detail }) => console.log(explain(detail)));

// @ts-expect-error: the status words are known
export const wrong = (job: Job) => job.status === "finished";
// @ts-expect-error: a result without a type is unknown
watch("/async/x").then((result) => result.rows);
// @ts-expect-error: the function is told a document
watch("/async/x", { onProgress: (text: string) => text });
// @ts-expect-error: an address is needed
start();
// @ts-expect-error: read-only
element.job = null;
