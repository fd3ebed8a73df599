/**
 * Start jobs, watch them, cancel them; and <async-job>, an element that shows one.
 *
 * One ES module without dependencies, as the browser runs it. pyramid_async serves it at
 * {prefix}/client.js; in a template its address is request.async_client_url(). Types and
 * the meaning of every option stand in client.d.ts.
 */

// Requests that the server is asked to hold at one time, for all jobs of a page together: the
// browser opens six connections to a host, and the server has few threads to hold them with.
const HELD = 2;
// Looks a second that are not held, for all jobs of a page together.
const RATE = 10;
// Seconds between two looks, where the server does not want more.
const LONGEST = 30;
// Seconds after which an answer of which nothing comes is taken for lost.
const PATIENCE = 20;

const RESULTS = "http://www.opengis.net/def/rel/ogc/1.0/results";

let held = 0;
let watched = 0;
/** Return the seconds to wait for something: what is asked for many jobs queues, six at a time. */
const patience = () => Math.max(PATIENCE, watched / 2);

// -- what goes wrong --------------------------------------------------------------------------

/** A refusal, or a job that did not succeed: `problem` is the server's own (RFC 9457). */
export class JobProblem extends Error {
  constructor(problem, { job, retryAfter } = {}) {
    super(problem.detail ?? problem.title);
    this.name = "JobProblem";
    this.problem = problem;
    this.job = job;
    this.retryAfter = retryAfter;
  }

  /** Say whether another try may help. */
  get passes() {
    const { status } = this.problem;
    return !this.job && (status > 500 || [408, 425, 429].includes(status));
  }
}

const trouble = (title, status) => new JobProblem({ type: "about:blank", title, status });

function refusal({ response, body }) {
  const { status, statusText } = response;
  const told = body?.title ? body : { type: "about:blank", title: statusText || `HTTP ${status}` };
  return new JobProblem({ ...told, status }, { retryAfter: secondsOf(response) });
}

// -- the three functions ----------------------------------------------------------------------

export async function start(url, { body, onStart, method = "POST", ...options } = {}) {
  const answer = await ask(absolute(url), options, { method, ...encoded(body) });
  if (!answer.response.ok) throw refusal(answer);
  const { response, body: job } = answer;
  const location = response.headers.get("Location") ?? linked(job, "monitor")?.href;
  if (response.status !== 202 || !location) throw trouble("No job was started.", response.status);
  const found = new URL(location, response.url).href;
  onStart?.(found);
  return outcome(await new Watch(found, options).end(job), found, options);
}

export async function watch(location, options = {}) {
  const url = absolute(location);
  return outcome(await new Watch(url, options).end(), url, options);
}

export async function cancel(location, options = {}) {
  const url = query(absolute(location), "only", "cancel");
  const answer = await ask(url, options, { method: "DELETE" }, patience());
  // 409: it had finished before, and the document says how.
  if (answer.body?.jobID) return answer.body;
  throw answer.response.ok ? trouble(`There is no job at ${url}.`, 200) : refusal(answer);
}

async function outcome(job, url, options) {
  if (job.status !== "successful") throw new JobProblem(job.error ?? dismissal(), { job });
  return "result" in job ? job.result : fetched(linked(job, RESULTS), url, options);
}

/** Return a result that is too large for the document; of a file, the link to it. */
async function fetched(link, url, options) {
  if (isFile(link)) return link;
  const href = new URL(link.href, url);
  return insist(options, async () => {
    const answer = await ask(href, options, {}, patience());
    if (!answer.response.ok) throw refusal(answer);
    // Such as the form of a login, where a redirect led to.
    const isOther = answer.body === undefined && answer.response.status !== 204;
    if (isOther) throw trouble(`There is no result at ${href}.`, 200);
    return answer.body;
  });
}

function dismissal() {
  const type = "urn:pyramid-async:problem:dismissed";
  return { type, title: "The job was cancelled.", status: 404 };
}

// -- watching ---------------------------------------------------------------------------------

/** One job, looked at until it is done. */
class Watch {
  constructor(url, options) {
    const { headers, credentials } = options;
    new Request(url, { headers, credentials }); // what no attempt could send is thrown here
    this.url = url;
    this.options = options;
    this.since = now();
    this.mayHold = false;
  }

  /** Return the last document; the first may be known from the start. */
  async end(job) {
    watched += 1;
    try {
      let pause = job ? this.pauseAfterFirst(job.retryAfter ?? 1) : 0;
      while (!this.tell(job)) {
        await until(this.options.signal, pause);
        const known = job !== undefined;
        // After an absence the page shows what is before it is held again; not at once after a
        // failure, which may have come of being held.
        [job, pause] = await insist(this.options, (away, failures) =>
          this.look(known && !away, known && (!away || failures > 0)),
        );
      }
      return job;
    } finally {
      watched -= 1;
      this.release();
    }
  }

  tell(job) {
    if (!job) return false;
    // Of several servers those that do not run the job may know less of it.
    if (!job.done && this.progress > (job.progress ?? -1)) job.progress = this.progress;
    this.progress = job.progress;
    this.options.onProgress?.(job);
    return job.done;
  }

  /** Return the document and the seconds until the next look. */
  async look(wait, paced) {
    const seconds = wait && this.reserve() ? this.patience() : 0;
    const begun = now();
    const { response, job } = await this.ask(seconds);
    if (response.headers.has("Preference-Applied")) {
      // The server paced this look, unless the wait was cut short.
      return [job, Math.max(gap(), seconds - (now() - begun))];
    }
    this.release();
    const least = secondsOf(response) ?? job.retryAfter ?? 1;
    return [job, paced ? this.pace(least) : this.pauseAfterFirst(least)];
  }

  async ask(seconds) {
    const url = seconds ? query(this.url, "wait", seconds) : this.url;
    try {
      const answer = await ask(url, this.options, {}, seconds + patience());
      if (!answer.response.ok) throw refusal(answer);
      const { response, body } = answer;
      if (typeof body?.done !== "boolean") throw trouble(`There is no job at ${url}.`, 200);
      return { response, job: body };
    } catch (error) {
      this.release();
      throw error;
    }
  }

  /** A first look shows the page something; the wait may begin right after it. */
  pauseAfterFirst(least) {
    return this.reserve() ? 0 : this.pace(least);
  }

  /** Seconds until the next look where the server does not hold: rarer as the job gets older. */
  pace(least) {
    const own = Math.max(this.age() / 4, watched / RATE);
    return Math.max(least, Math.min(own, LONGEST)) * jitter();
  }

  /** Seconds for which the server is asked to hold: the end is seen at once, progress after it. */
  patience() {
    const age = this.age();
    return Math.floor(Math.max(Math.min(1 + age / 4, 5), Math.min(age / 12, 15)));
  }

  age() {
    return now() - this.since;
  }

  /** Take one of the page's places to be held, or say that there is none. */
  reserve() {
    if (!this.mayHold && held < HELD) {
      this.mayHold = true;
      held += 1;
    }
    return this.mayHold;
  }

  release() {
    held -= this.mayHold ? 1 : 0;
    this.mayHold = false;
  }
}

/** Repeat an attempt while the network or the server is away and while nobody looks. */
async function insist({ signal, onRetry }, attempt) {
  for (let failures = 0, away = false; ; failures += 1, away = true) {
    while (globalThis.document?.hidden) {
      away = true;
      await until(signal, Infinity, document, "visibilitychange");
    }
    try {
      return await attempt(away, failures);
    } catch (error) {
      signal?.throwIfAborted();
      if (error instanceof JobProblem && !error.passes) throw error;
      const seconds = Math.max(error.retryAfter ?? 1, Math.min(2 ** failures, LONGEST)) * jitter();
      onRetry?.(error, seconds);
      await until(signal, seconds, globalThis, "online");
    }
  }
}

/** Wait for a time or an event, whichever comes first; reject when the signal aborts. */
function until(signal, seconds, target, type) {
  signal?.throwIfAborted();
  return new Promise((resolve, reject) => {
    const listeners = new AbortController();
    const timer = seconds < Infinity ? setTimeout(end, seconds * 1000) : 0;
    function end() {
      clearTimeout(timer);
      listeners.abort();
      if (signal?.aborted) reject(signal.reason);
      else resolve();
    }
    target?.addEventListener?.(type, end, { signal: listeners.signal });
    signal?.addEventListener("abort", end, { signal: listeners.signal });
  });
}

const now = () => performance.now() / 1000;
// Upwards only: what the server asks for is the least.
const jitter = () => 1 + Math.random() / 4;
// Between two held requests, so that others get their turn.
const gap = () => 0.1 + Math.random() / 5;

// -- HTTP -------------------------------------------------------------------------------------

/** Return the response, of which something has to come every *seconds*, and its body if JSON. */
async function ask(url, { signal, headers, credentials, token }, init = {}, seconds = Infinity) {
  signal?.throwIfAborted();
  const { method = "GET", type, body } = init;
  const sent = new Headers(headers);
  if (type) sent.set("Content-Type", type);
  // Not with a GET: from another origin it would cost a preflight.
  if (token && method !== "GET") sent.set("X-CSRF-Token", token);
  const stop = new AbortController();
  const abort = () => stop.abort(signal?.reason);
  signal?.addEventListener("abort", abort);
  let timer;
  const renew = () => {
    clearTimeout(timer);
    if (seconds < Infinity) timer = setTimeout(abort, seconds * 1000);
  };
  renew();
  try {
    const options = { method, headers: sent, body, credentials, signal: stop.signal };
    const response = await fetch(url, options);
    return { response, body: await read(response, renew) };
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", abort);
  }
}

async function read(response, renew) {
  if (!isJson(response.headers.get("Content-Type"))) return response.body?.cancel();
  // A fetch of script, such as a test's or a polyfill, may have no stream.
  const text = await (response.body ? textOf(response.body, renew) : response.text());
  try {
    return JSON.parse(text);
  } catch (error) {
    // A refusal counts, whatever it says.
    if (response.ok) throw error;
  }
}

/** Return all of a stream; on a slow network it may take its time. */
async function textOf(stream, renew) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  for (let text = ""; ; renew()) {
    const { done, value } = await reader.read();
    if (done) return text + decoder.decode();
    text += decoder.decode(value, { stream: true });
  }
}

/** Send what fetch knows as it is, and anything else as JSON. */
function encoded(body) {
  const [, kind] = Object.prototype.toString.call(body).split(/[ \]]/);
  const isData = ["Object", "Array", "Number", "Boolean"].includes(kind);
  if (!isData) return { body: body ?? undefined };
  return { type: "application/json", body: JSON.stringify(body) };
}

/** Return the seconds of Retry-After, which may be a date, or undefined. */
function secondsOf(response) {
  const text = response.headers.get("Retry-After");
  if (!text) return undefined;
  const seconds = Number(text) || (Date.parse(text) - Date.now()) / 1000 || 1;
  return Math.min(Math.max(seconds, 1), 3600);
}

const isJson = (type) => /^application\/([\w.+-]+\+)?json\b/i.test(type ?? "");
const isFile = (link) => Boolean(link?.download) || !isJson(link?.type);
const linked = (job, rel) => job?.links?.find((link) => link.rel === rel);
const base = () => globalThis.document?.baseURI ?? globalThis.location?.href;

/** Return the address without the credentials that a page's may have: fetch takes none. */
function absolute(url) {
  const found = new URL(url, base());
  found.username = found.password = "";
  return found.href;
}

function query(url, name, value) {
  const result = new URL(url);
  result.searchParams.set(name, value);
  return result.href;
}

// -- <async-job> ------------------------------------------------------------------------------

/** What the element says; an application may put its own language here. */
export const texts = {
  job: "Job",
  accepted: "Waiting",
  running: "Running",
  successful: "Finished",
  failed: "Failed",
  dismissed: "Cancelled",
  retrying: "The server does not answer. Trying again.",
  lost: "Not available",
  notCancelled: "It could not be cancelled. Try again.",
  cancel: "Cancel",
  result: "Open the result",
  file: "Download the file",
  errorID: (id) => `Something went wrong. The log has it under ${id}.`,
  percent: (number) => `${number} %`,
};

/** Make an element; not of markup, for which a page's policy may want Trusted Types. */
function made(name, attributes, ...content) {
  const element = document.createElement(name);
  for (const each of Object.entries(attributes)) element.setAttribute(...each);
  element.append(...content);
  return element;
}

/** Make an element that pages may style. */
const part = (name, id, more, ...content) => made(name, { id, part: id, ...more }, ...content);

function inside() {
  const bar = { role: "progressbar", "aria-labelledby": "title", "aria-valuemin": 0, "aria-valuemax": 100 };
  const line = { id: "line", part: "message" };
  const button = { type: "button", "aria-labelledby": "cancel title", hidden: "" };
  return part(
    "div",
    "job",
    { role: "group", "aria-labelledby": "title", tabindex: -1 },
    made("p", { id: "head" }, part("span", "title", { dir: "auto" }), " ", part("span", "status", { role: "status" })),
    part("div", "bar", bar, part("div", "fill")),
    made("p", line, made("span", { id: "percent" }), " ", made("span", { id: "message", dir: "auto" })),
    part("p", "error", { role: "alert", dir: "auto", hidden: "" }),
    made(
      "p",
      { id: "actions" },
      part("button", "cancel", button),
      " ",
      part("a", "result", { "aria-labelledby": "result title", hidden: "" }),
    ),
  );
}

// Text has the colour that the page gives it, so it can be read wherever the page's own can.
const STYLE = `
:host { display: block; margin-block: 1em; }
:host([hidden]), [hidden] { display: none !important; }
p { margin: .35em 0; overflow-wrap: anywhere; }
p:not(:has(:not([hidden]):not(:empty))):not(#error) { display: none; }
#head { display: flex; flex-wrap: wrap; gap: 0 .75em; justify-content: space-between; }
#title { font-weight: 600; }
#percent { font-variant-numeric: tabular-nums; }
#percent:not(:empty) { margin-inline-end: .5em; }
#bar {
  box-sizing: border-box;
  block-size: var(--async-job-height, .75em);
  overflow: hidden;
  border: 1px solid var(--async-job-border, color-mix(in srgb, currentColor 60%, transparent));
  border-radius: var(--async-job-radius, .4em);
  background: var(--async-job-track, color-mix(in srgb, currentColor 10%, transparent));
}
#fill {
  block-size: 100%;
  background: var(--async-job-color, #3a7fc6);
  transition: inline-size .4s;
}
#bar:not([aria-valuenow]) #fill { inline-size: 30%; animation: move 1.6s ease-in-out infinite alternate; }
@keyframes move { to { margin-inline-start: 70%; } }
#error { border-inline-start: .25em solid var(--async-job-error, #c9453b); padding-inline-start: .6em; }
button, a {
  display: inline-block;
  box-sizing: border-box;
  min-block-size: 1.75em;
  padding: .25em .8em;
  font: inherit;
  color: inherit;
  background: transparent;
  border: 1px solid currentColor;
  border-radius: var(--async-job-radius, .4em);
  text-decoration: none;
  cursor: pointer;
}
button:hover, a:hover { background: color-mix(in srgb, currentColor 10%, transparent); }
:focus-visible { outline: 3px solid var(--async-job-color, #3a7fc6); outline-offset: 2px; }
[aria-disabled="true"] { border-style: dashed; cursor: default; }
@media (prefers-reduced-motion: reduce) {
  #fill { transition: none; }
  #bar:not([aria-valuenow]) #fill { inline-size: 100%; opacity: .4; animation: none; }
}
@media (forced-colors: active) {
  #bar { border-color: CanvasText; }
  #fill { background: Highlight; forced-color-adjust: none; }
}`;

// A page's policy may forbid <style> elements; it allows sheets that script makes.
let sheet;

function styled(root) {
  if (!sheet) {
    sheet = new CSSStyleSheet();
    sheet.replaceSync(STYLE);
  }
  root.adoptedStyleSheets = [sheet];
}

// Where there are no elements the functions can be used all the same.
const Base = globalThis.HTMLElement ?? Object;

export class AsyncJobElement extends Base {
  static observedAttributes = ["src", "label"];

  #parts = {};
  #stop;
  #job = null;
  #followed; // the address of the job that is shown
  #headers;

  constructor() {
    super();
    const root = this.attachShadow({ mode: "open" });
    root.append(inside());
    styled(root);
    for (const part of root.querySelectorAll("[id]")) this.#parts[part.id] = part;
    this.#parts.cancel.addEventListener("click", () => this.cancel());
  }

  /** The last document that was seen, or null. */
  get job() {
    return this.#job;
  }

  connectedCallback() {
    // Set before the module was there, it hides the property of the same name.
    if (Object.hasOwn(this, "src")) {
      const { src } = this;
      delete this.src;
      this.src = src;
    } else if (this.#followed !== this.src) this.#follow();
    else this.#name();
  }

  disconnectedCallback() {
    // Not at once: who only moves it, at each news say, is not to start it anew.
    queueMicrotask(() => {
      if (this.isConnected) return;
      this.#followed = undefined;
      this.#stop?.abort();
    });
  }

  attributeChangedCallback(name, before, after) {
    if (!this.isConnected || before === after) return;
    if (name === "src") this.#follow();
    else this.#name();
  }

  /** Cancel the job; the element shows what became of it. */
  async cancel() {
    const { cancel: button } = this.#parts;
    const stop = this.#stop;
    if (!stop || stop.signal.aborted || button.getAttribute("aria-disabled") === "true") return;
    if (this.#refused) this.#say(""); // that it is said again is heard
    // Not disabled: it would lose the focus.
    button.setAttribute("aria-disabled", "true");
    try {
      const job = await cancel(this.src, { ...this.#options(), signal: stop.signal });
      stop.abort();
      this.#show(job);
    } catch {
      if (!stop.signal.aborted) this.#say(texts.notCancelled);
    } finally {
      button.removeAttribute("aria-disabled");
    }
  }

  /** Say whether the status tells that the job could not be cancelled. */
  get #refused() {
    return this.#parts.status.textContent === texts.notCancelled;
  }

  get src() {
    return this.getAttribute("src") ?? "";
  }

  set src(url) {
    this.setAttribute("src", url);
  }

  // React, Vue and Svelte make an attribute of what the element does not have.
  get headers() {
    return this.#headers;
  }

  set headers(headers) {
    this.#headers = headers ?? undefined; // frameworks give null, of which no Headers are made
  }

  #options() {
    const credentials = this.getAttribute("credentials") ?? undefined;
    return { credentials, token: this.getAttribute("token"), headers: this.headers };
  }

  async #follow() {
    this.#stop?.abort();
    this.#job = null;
    this.#followed = this.src;
    this.#reset();
    if (!this.src) return;
    const stop = (this.#stop = new AbortController());
    const { signal } = stop;
    const onProgress = (job) => this.#show(job);
    const onRetry = (error, seconds) => {
      // Firefox and WebKit cut what is under way when a link is followed, a download's too.
      const isCut = error instanceof TypeError && seconds < 2;
      if (!isCut) this.#say(texts.retrying);
    };
    try {
      const options = { ...this.#options(), signal, onProgress, onRetry };
      await new Watch(absolute(this.src), options).end();
    } catch (error) {
      if (!signal.aborted) this.#fail(error);
    }
  }

  #reset() {
    const { bar, fill, percent, message, error, result, cancel } = this.#parts;
    for (const part of [percent, message, error]) part.textContent = "";
    for (const part of [error, result, cancel]) part.hidden = true;
    bar.hidden = false;
    bar.removeAttribute("aria-valuenow");
    fill.style.inlineSize = "";
    this.#say("");
    this.#name();
  }

  #name() {
    const title = this.getAttribute("label") || this.#job?.title || texts.job;
    if (this.#parts.title.textContent !== title) this.#parts.title.textContent = title;
  }

  /** The status is a live region: only what changes is said. */
  #say(text) {
    if (this.#parts.status.textContent !== text) this.#parts.status.textContent = text;
  }

  #show(job) {
    if (this.#job?.done) return;
    const before = this.#job;
    this.#job = job;
    this.#name();
    // Not before: a module that puts another language there runs after the elements are made.
    if (!before) this.#parts.cancel.textContent = texts.cancel;
    // That the job could not be cancelled stands until it is news no more.
    if (job.status !== before?.status || !this.#refused) this.#say(texts[job.status] ?? job.status);
    this.#parts.message.textContent = job.message ?? "";
    this.#measure(job);
    if (job.done) this.#end(job);
    this.#parts.cancel.hidden = job.done || this.hasAttribute("no-cancel");
    this.#tell("jobchange", job);
    if (job.done) this.#tell("jobdone", job);
  }

  #measure(job) {
    const { bar, fill, percent } = this.#parts;
    const known = job.progress !== undefined;
    percent.textContent = known ? texts.percent(job.progress) : "";
    // The bar goes on from the last measure, not from where the one without a measure stood.
    fill.style.transition = bar.hasAttribute("aria-valuenow") ? "" : "none";
    if (known) bar.setAttribute("aria-valuenow", job.progress);
    else bar.removeAttribute("aria-valuenow");
    fill.style.inlineSize = known ? `${job.progress}%` : "";
  }

  #end(job) {
    const { bar, percent, result } = this.#parts;
    if (job.status !== "successful") {
      bar.hidden = true;
      percent.textContent = "";
    }
    if (job.error) this.#explain(job.error);
    const link = job.result === null ? null : linked(job, RESULTS);
    if (link) this.#offer(link);
    this.#keepFocus(link ? result : this.#parts.job);
  }

  /** The button is about to go and would take the focus with it. */
  #keepFocus(other) {
    if (this.shadowRoot.activeElement === this.#parts.cancel) other.focus();
  }

  #offer(link) {
    const { result } = this.#parts;
    const url = new URL(link.href, absolute(this.src));
    if (!/^https?:$/.test(url.protocol)) return;
    result.href = url.href;
    result.textContent = isFile(link) ? texts.file : texts.result;
    result.toggleAttribute("download", isFile(link));
    result.hidden = false;
  }

  #explain(problem) {
    const { error } = this.#parts;
    const { detail, errorID, title } = problem;
    error.textContent = detail ?? (errorID ? texts.errorID(errorID) : title);
    error.hidden = false;
  }

  #fail(error) {
    const { bar, cancel, percent, message } = this.#parts;
    this.#keepFocus(this.#parts.job);
    bar.hidden = cancel.hidden = true;
    percent.textContent = message.textContent = "";
    this.#say(texts.lost);
    this.#explain(error.problem ?? { title: error.message });
    const stop = this.#stop;
    this.#tell("joberror", error);
    // Put in place again, it tries again; unless a handler gave it another job.
    if (this.#stop === stop) this.#followed = undefined;
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail, bubbles: true, composed: true }));
  }
}

if (globalThis.customElements && !customElements.get("async-job")) {
  customElements.define("async-job", AsyncJobElement);
}
