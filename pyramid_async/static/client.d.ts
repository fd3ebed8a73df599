/** The browser client of pyramid_async; see `client.js`, which is used as it is. */

export type Status = "accepted" | "running" | "successful" | "failed" | "dismissed";

/** A link of a document (RFC 8288). */
export interface Link {
  href: string;
  rel: string;
  type?: string;
  /** True for the results link of a file, which may be of JSON too. */
  download?: boolean;
}

/** What went wrong, in the server's words (RFC 9457). */
export interface Problem {
  type: string;
  title: string;
  status?: number;
  /** A text for the user. */
  detail?: string;
  /** Found in the server's log. */
  errorID?: string;
  [member: string]: unknown;
}

/** The status document of a job; a server may add members. */
export interface Job<Result = unknown> {
  jobID: string;
  type: "process";
  status: Status;
  /** True for a status that is final. */
  done: boolean;
  processID?: string;
  title?: string;
  /** RFC 3339, UTC, as the other times. */
  created: string;
  updated: string;
  started?: string;
  finished?: string;
  expires?: string;
  /** 0 to 100; it never falls, and is 100 only when the job is successful. */
  progress?: number;
  message?: string;
  /** Seconds until another look may be worth it. */
  retryAfter?: number;
  result?: Result;
  error?: Problem;
  links: Link[];
}

/** How requests are sent. */
export interface RequestOptions {
  /** Sent with every request, such as `Authorization`. From another origin they cost preflights. */
  headers?: HeadersInit;
  /** `"include"` sends cookies to another origin. */
  credentials?: RequestCredentials;
  /** The CSRF token, sent as `X-CSRF-Token` by `start` and `cancel`. */
  token?: string | null;
  /** Ends the wait; the job goes on. */
  signal?: AbortSignal | null;
}

export interface WatchOptions extends RequestOptions {
  /** Told every document that is seen, the last one too. */
  onProgress?: (job: Job) => void;
  /** Told that the server does not answer and is asked again after so many seconds. */
  onRetry?: (error: Error, seconds: number) => void;
}

export interface StartOptions extends WatchOptions {
  /** Plain objects, arrays, numbers and booleans are sent as JSON, all else as `fetch` sends it. */
  body?: BodyInit | object | number | boolean | null;
  /** `"POST"` unless given. */
  method?: string;
  /** Told the job's address as soon as it exists: store it, and `watch` it after a reload. */
  onStart?: (location: string) => void;
}

/** Why there is no result: the request was refused, or the job failed or was cancelled. */
export class JobProblem extends Error {
  constructor(problem: Problem, more?: { job?: Job; retryAfter?: number });
  readonly problem: Problem;
  /** The last document, where it is the job that has no result. */
  readonly job?: Job;
  /** Seconds, where it is the server that refused. */
  readonly retryAfter?: number;
  /** Whether another try may help. */
  get passes(): boolean;
}

/**
 * Start a job and return its result.
 *
 * The result of a file is the link to it. Rejects with a JobProblem, or with the signal's reason.
 * A start that is refused or gets no answer is not repeated by the client; the latter rejects with
 * fetch's error, and there may be a job all the same. Of a connection that breaks the browser itself
 * may repeat it: two jobs, unless the server gives them a `key`.
 */
export function start<Result = unknown>(
  url: string | URL,
  options?: StartOptions,
): Promise<Result>;

/**
 * Watch a job until it is done and return its result, as `start` does.
 *
 * Lost connections and servers that start again are survived; while the page is hidden nothing is
 * asked.
 */
export function watch<Result = unknown>(
  location: string | URL,
  options?: WatchOptions,
): Promise<Result>;

/**
 * Cancel a job that is not finished; return its document, which says what became of it.
 *
 * Not repeated: rejects with a JobProblem, or with fetch's error where no answer came.
 */
export function cancel(location: string | URL, options?: RequestOptions): Promise<Job>;

/** What the element says; put another language here before the first document of a job arrives. */
export const texts: {
  job: string;
  accepted: string;
  running: string;
  successful: string;
  failed: string;
  dismissed: string;
  retrying: string;
  lost: string;
  notCancelled: string;
  cancel: string;
  result: string;
  file: string;
  errorID: (id: string) => string;
  percent: (number: number) => string;
};

/**
 * `<async-job src="…">`: progress, message, a button to cancel, the result.
 *
 * Attributes: `src`, `label` (the job's title unless given), `token`, `credentials`, `no-cancel`.
 * What stands inside is shown where there is no script.
 * Events, which bubble: `jobchange` and `jobdone` with the document, `joberror` with the error.
 * Parts: job, title, status, bar, fill, message, error, cancel, result.
 * Properties for style: `--async-job-color`, `-track`, `-border`, `-error`, `-height`, `-radius`.
 */
export class AsyncJobElement extends HTMLElement {
  src: string;
  /** Sent with every request. */
  headers?: HeadersInit;
  /** The last document that was seen. */
  get job(): Job | null;
  cancel(): Promise<void>;
}

declare global {
  interface HTMLElementTagNameMap {
    "async-job": AsyncJobElement;
  }
  interface GlobalEventHandlersEventMap {
    jobchange: CustomEvent<Job>;
    jobdone: CustomEvent<Job>;
    joberror: CustomEvent<Error>;
  }
}
