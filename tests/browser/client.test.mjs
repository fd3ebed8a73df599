/** What the client does in a real browser, against the demo on waitress. */

import assert from "node:assert/strict";
import { after, afterEach, before, test } from "node:test";
import axe from "axe-core";
import { launch, Server, sleep, until, Visit } from "./stage.mjs";

const LIMIT = { timeout: 60_000 };

let browser, server;
const visits = [];
const others = [];

before(async () => {
  [browser, server] = await Promise.all([launch(), Server.started()]);
});

afterEach(async () => {
  const complaints = visits.flatMap((visit) => visit.complaints);
  await Promise.all(visits.splice(0).map((visit) => visit.close()));
  server.open();
  await Promise.all(others.splice(0).map((other) => other.close()));
  assert.deepEqual(complaints, []);
});

after(async () => {
  await browser?.close();
  await server?.close();
});

async function visit(options = {}, where = server) {
  const begun = await Visit.begun(browser, where, options);
  visits.push(begun);
  return begun;
}

async function otherServer(settings) {
  const other = await Server.started(settings);
  others.push(other);
  return other;
}

/** Start a job in the page, as applications do, and gather all that is told. */
function started(page, url, body, options = {}) {
  return page.evaluate(
    async ([url, body, options]) => {
      const seen = [];
      const told = { onProgress: (job) => seen.push(job), onStart: (at) => (told.location = at) };
      const begun = Date.now();
      const end = await client.start(url, { body, ...told, ...options }).then(
        (result) => ({ result }),
        ({ name, message, problem, retryAfter }) => ({ error: { name, message, problem, retryAfter } }),
      );
      return { ...end, seen, location: told.location, begun, at: Date.now() };
    },
    [url, body, options],
  );
}

/** Watch a job in the page. */
function watched(page, path) {
  return page.evaluate(async (path) => {
    const seen = [];
    const onProgress = (job) => seen.push(job);
    return client.watch(path, { onProgress }).then(
      (result) => ({ result, seen }),
      ({ name, problem }) => ({ error: { name, problem }, seen }),
    );
  }, path);
}

// -- the functions ----------------------------------------------------------------------------

test("start gives the result and tells progress and message on the way", LIMIT, async () => {
  const { page } = await visit();
  const { result, seen, location } = await started(page, "/probe/work", { seconds: 4, steps: 20 });
  assert.deepEqual(result, { result: "done", steps: 20 });
  assert.match(location, /\/async\/[\w-]{20,}$/);
  assert.equal(seen[0].status, "accepted");
  assert.equal(seen.at(-1).done, true);
  const progress = seen.map((job) => job.progress ?? 0);
  assert.deepEqual(progress, progress.toSorted((a, b) => a - b));
  assert.ok(progress.filter((number) => number > 0 && number < 100).length >= 2, progress.join());
  assert.ok(seen.some((job) => /^Working/.test(job.message)));
});

test("a failure rejects with the server's problem", LIMIT, async () => {
  const { page } = await visit();
  const { error } = await started(page, "/probe/refuse", { text: "Too late." });
  assert.equal(error.name, "JobProblem");
  assert.equal(error.message, "Too late.");
  assert.equal(error.problem.detail, "Too late.");
  const crashed = await started(page, "/probe/crash");
  assert.match(crashed.error.problem.errorID, /\w+/);
  assert.ok(!JSON.stringify(crashed).includes("secret"));
});

test("a start that is refused rejects and is not repeated", LIMIT, async () => {
  const { page } = await visit();
  const requests = [];
  page.on("request", (request) => requests.push(request.method()));
  const { error } = await started(page, "/probe/nothing-of-this-name", { x: 1 });
  assert.equal(error.problem.status, 500);
  await page.route("**/probe/work", (route) =>
    route.fulfill({
      status: 503,
      headers: { "Retry-After": "7" },
      contentType: "application/problem+json",
      body: '{"type": "about:blank", "title": "Full.", "status": 503}',
    }),
  );
  const full = await started(page, "/probe/work");
  assert.deepEqual(full.error, { name: "JobProblem", message: "Full.", problem: { type: "about:blank", title: "Full.", status: 503 }, retryAfter: 7 });
  assert.deepEqual(requests, ["POST", "POST"]);
  const page404 = await started(page, "/");
  assert.equal(page404.error.name, "JobProblem");
});

test("a large result is fetched and a file is given as its link", LIMIT, async () => {
  const { page } = await visit();
  const { result } = await started(page, "/probe/large", { size: 200_000 });
  assert.equal(result.length, 200_000);
  const file = await started(page, "/probe/file");
  assert.equal(file.result.type, "text/csv");
  assert.match(file.result.href, /\/results$/);
  const lines = await started(page, "/probe/json_lines");
  assert.deepEqual([lines.result.type, lines.result.download], ["application/json", true]);
});

/** Answer as a login does where a session is over, in place of the server. */
const login = (route) => route.fulfill({ contentType: "text/html", body: "<h1>Who are you?</h1>" });

/** Answer with a job's document, in place of the server. */
const told = (route, job) =>
  route.fulfill({
    contentType: "application/json",
    body: JSON.stringify({ status: "running", done: false, links: [], ...job }),
  });

/** Answer with a finished job to whoever sends an Authorization, with 401 to others. */
const toldIfAuthorized = (route) =>
  route.request().headers().authorization
    ? told(route, { status: "successful", done: true })
    : route.fulfill({ status: 401 });

test("a page of another kind is neither a cancelled job nor a large result", LIMIT, async () => {
  const { page } = await visit();
  const path = await server.job("work", { seconds: 20, steps: 100 });
  await page.route("**/async/*?only=cancel", login, { times: 1 });
  const refused = await page.evaluate(
    (path) => client.cancel(path, { token }).then(() => "cancelled", ({ name }) => name),
    path,
  );
  assert.equal(refused, "JobProblem");
  await page.evaluate((path) => client.cancel(path, { token }), path);
  await page.route("**/async/*/results", login);
  const { error } = await started(page, "/probe/large", { size: 200_000 });
  assert.match(error.message, /no result/);
});

test("an address with a password is asked without it, and what cannot be sent rejects", LIMIT, async () => {
  const { page } = await visit();
  const path = await server.job("work", { seconds: 0 });
  const result = await page.evaluate((path) => {
    const url = new URL(path, location);
    url.username = url.password = "x";
    return client.watch(url.href);
  }, path);
  assert.equal(result.result, "done");
  const name = await page.evaluate(
    (path) => client.watch(path, { headers: { "X-Name": "€" } }).catch((error) => error.name),
    path,
  );
  assert.equal(name, "TypeError");
});

test("credentials of no known kind are refused at once, and no job is asked for", LIMIT, async () => {
  const shown = await visit();
  const name = await shown.page.evaluate(() => {
    const src = 'src="/async/nothing" credentials="yes"';
    document.querySelector("main").insertAdjacentHTML("beforeend", `<async-job ${src}></async-job>`);
    const options = { credentials: "yes", signal: AbortSignal.timeout(5000) };
    return client.watch("/async/nothing", options).catch((error) => error.name);
  });
  assert.equal(name, "TypeError");
  assert.match(await shown.text("error"), /credentials/);
  assert.equal(shown.looks.length, 0);
});

test("cancel dismisses the job and whoever watches it is told", LIMIT, async () => {
  const { page } = await visit();
  const path = await server.job("work", { seconds: 20, steps: 100 });
  const watching = watched(page, path);
  const job = await page.evaluate((path) => client.cancel(path, { token }), path);
  assert.equal(job.status, "dismissed");
  const { error } = await watching;
  assert.match(error.problem.type, /dismissed/);
  assert.equal((await server.status(path)).status, "dismissed");
});

test("cancel leaves a finished job alone and says how it ended", LIMIT, async () => {
  const { page } = await visit();
  const path = await server.job("work", { seconds: 0 });
  await server.finished(path);
  const job = await page.evaluate((path) => client.cancel(path, { token }), path);
  assert.equal(job.status, "successful");
  assert.equal((await server.status(path)).status, "successful");
});

test("aborting the wait leaves the job alone and no request behind", LIMIT, async () => {
  const { page, looks } = await visit();
  const path = await server.job("work", { gate: server.gate() });
  const [name, late] = await page.evaluate(async (path) => {
    const stop = new AbortController();
    let aborted;
    const abort = () => {
      aborted = performance.now();
      stop.abort();
    };
    const options = { signal: stop.signal, onProgress: () => setTimeout(abort, 300) };
    const error = await client.watch(path, options).catch((error) => error);
    return [error.name, performance.now() - aborted];
  }, path);
  assert.equal(name, "AbortError");
  assert.ok(late < 3000, `${late} ms`); // the request that was held then goes on for 20 s
  const count = looks.length;
  server.open();
  assert.equal((await server.finished(path)).status, "successful");
  assert.equal(looks.length, count);
  const aborted = await page.evaluate(
    (path) => client.watch(path, { signal: AbortSignal.abort() }).catch((error) => error.name), path);
  assert.equal(aborted, "AbortError");
  assert.equal(looks.length, count);
});

test("a job that is already done costs one request", LIMIT, async () => {
  const { page, looks } = await visit();
  const path = await server.job("work", { seconds: 0 });
  await server.finished(path);
  const { result } = await watched(page, path);
  assert.equal(result.result, "done");
  assert.equal(looks.length, 1);
});

test("a job that is not yours is not found and not asked for again", LIMIT, async () => {
  const { page, looks, context } = await visit();
  const path = await server.job("work", { seconds: 2 }, { Cookie: "user=alice" });
  await context.addCookies([{ name: "user", value: "bob", url: server.origin }]);
  const { error } = await watched(page, path);
  assert.match(error.problem.type, /no-such-job$/);
  assert.equal(error.problem.status, 404);
  await context.addCookies([{ name: "user", value: "alice", url: server.origin }]);
  assert.equal((await watched(page, path)).result.result, "done");
  assert.equal(looks.filter((look) => look.url.endsWith(path)).length, 2);
});

test("an address without a job rejects", LIMIT, async () => {
  const { page } = await visit();
  const name = await page.evaluate(() => client.watch("/").catch((error) => error.name));
  assert.equal(name, "JobProblem");
});

// -- how often --------------------------------------------------------------------------------

test("a short job is seen done within half a second of its end", LIMIT, async () => {
  const { page } = await visit();
  for (let round = 0; round < 5; round += 1) {
    const { seen, at } = await started(page, "/probe/still", { seconds: 1 });
    const late = at - Date.parse(seen.at(-1).finished);
    assert.ok(late < 500, `${late} ms`);
    assert.ok(seen.length <= 4, `${seen.length} looks`);
  }
});

test("a short job is seen soon where the server does not hold", LIMIT, async () => {
  const unheld = await otherServer({ "async.wait_slots": 0 });
  const { page } = await visit({}, unheld);
  for (let round = 0; round < 5; round += 1) {
    const { seen, at } = await started(page, "/probe/still", { seconds: 1 });
    const late = at - Date.parse(seen.at(-1).finished);
    // What Retry-After and its jitter add: a look at 1.0 to 1.25 s may come just too early.
    assert.ok(late < 1500, `${late} ms`);
  }
});

test("a job of a minute costs at most twenty looks, held or not", { timeout: 150_000 }, async () => {
  const unheld = await otherServer({ "async.wait_slots": 0 });
  const cases = [[server, 6.5], [unheld, 38]];
  await Promise.all(
    cases.map(async ([where, longest]) => {
      const { page, looks } = await visit({}, where);
      const { seen, at } = await started(page, "/probe/work", { seconds: 60, steps: 120 });
      assert.ok(looks.length <= 20, `${looks.length} looks`);
      const pauses = looks.slice(1).map((look, index) => (look.at - looks[index].at) / 1000);
      // The job's own estimate, up to 30 s, is obeyed where the server does not hold, and does not
      // stop the bar where it does.
      assert.ok(Math.max(...pauses) < longest, pauses.join());
      if (where === server) assert.ok(at - Date.parse(seen.at(-1).finished) < 500);
    }),
  );
});

test("Retry-After is a floor with jitter where the server does not hold", LIMIT, async () => {
  const { page } = await visit();
  const times = [];
  await page.route("**/async/pretended*", (route) => {
    times.push(Date.now());
    route.fulfill({
      headers: { "Retry-After": "2" },
      contentType: "application/json",
      body: JSON.stringify({ status: "running", done: times.length === 4, links: [] }),
    });
  });
  for (const [chance, least, most] of [[0, 1990, 2400], [0.96, 2470, 2900]]) {
    times.length = 0;
    await page.evaluate((chance) => (Math.random = () => chance), chance);
    await watched(page, "/async/pretended");
    const pauses = times.slice(1).map((time, index) => time - times[index]);
    // The first look shows the page something; the second asks to be held, in vain.
    assert.ok(pauses.shift() < 500);
    assert.ok(pauses.every((pause) => pause >= least && pause < most), pauses.join());
  }
});

test("thirty jobs on a page leave threads to other requests", { timeout: 120_000 }, async () => {
  // The server would let itself be held by all: it is the client that spares it.
  const small = await otherServer({ threads: 4, "async.wait_slots": 30 });
  const src = await Promise.all(
    Array.from({ length: 30 }, (_, number) => small.job("work", { seconds: 0.2 + number / 20 })),
  );
  const { page, looks } = await visit({ src }, small);
  const delays = [];
  const begun = Date.now();
  await until(async () => {
    const sent = Date.now();
    await (await fetch(small.origin + "/")).text();
    delays.push(Date.now() - sent);
    await sleep(50);
    const sentByPage = Date.now();
    await page.evaluate(() => fetch("/").then((answer) => answer.text()));
    delays.push(Date.now() - sentByPage);
    const texts = await page.locator("async-job [part=status]").allInnerTexts();
    return texts.every((text) => text === "Finished");
  }, 60);
  const seconds = (Date.now() - begun) / 1000;
  assert.ok(Math.max(...delays) < 1000, `${Math.max(...delays)} ms`);
  assert.ok(looks.length < 60 + 15 * seconds, `${looks.length} looks in ${seconds} s`);
});

// -- what gets in the way ---------------------------------------------------------------------

test("the network is lost and comes back", LIMIT, async () => {
  const { page, context, looks } = await visit();
  const path = await server.job("work", { gate: server.gate() });
  const watching = page.evaluate(async (path) => {
    globalThis.retries = [];
    const onRetry = (error, seconds) => retries.push(seconds);
    return client.watch(path, { onRetry });
  }, path);
  await until(() => looks.length > 1);
  await context.setOffline(true);
  await until(() => page.evaluate(() => retries.length >= 3));
  const retries = await page.evaluate(() => retries);
  [1, 2, 4].forEach((least, index) => {
    assert.ok(retries[index] >= least && retries[index] <= least * 1.25, retries.join());
  });
  server.open();
  await server.finished(path);
  const back = Date.now();
  await context.setOffline(false);
  assert.equal((await watching).result, "done");
  // The event that the network is back ends the pause.
  assert.ok(Date.now() - back < 1500);
});

for (const signal of ["SIGTERM", "SIGKILL"]) {
  test(`the server ends by ${signal} in mid-job and starts again`, { timeout: 90_000 }, async () => {
    const { page, looks } = await visit({ src: [] });
    const path = await server.job("work", { steps: 30, gate: server.gate() });
    await page.evaluate((path) => {
      document.querySelector("main").insertAdjacentHTML("beforeend", `<async-job src="${path}"></async-job>`);
    }, path);
    await until(() => looks.length > 1);
    await server.stop(signal);
    const status = page.locator("async-job [part=status]");
    await until(async () => /Trying again/.test(await status.innerText()));
    await server.start();
    server.open();
    await until(async () => (await status.innerText()) === "Finished", 40);
    assert.equal((await server.status(path)).status, "successful");
  });
}

test("a page that nobody sees asks nothing", LIMIT, async () => {
  const { page, looks } = await visit();
  const path = await server.job("work", { steps: 50, gate: server.gate() });
  const show = (hidden) =>
    page.evaluate((hidden) => {
      Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }, hidden);
  const watching = watched(page, path);
  await until(() => looks.length > 1);
  await show(true);
  await sleep(1500); // the look under way ends
  const count = looks.length;
  server.open();
  await server.finished(path);
  assert.equal(looks.length, count);
  const seen = Date.now();
  await show(false);
  assert.equal((await watching).result.result, "done");
  assert.ok(Date.now() - seen < 1000);
  assert.equal(looks.length, count + 1);
});

test("the first look after a failure or a hidden time is not held", LIMIT, async () => {
  const { page, looks } = await visit();
  const documents = [{}, undefined, {}, {}, { done: true }];
  await page.route("**/async/pretended*", (route) => {
    const job = documents.shift();
    return job ? told(route, job) : route.abort();
  });
  await page.evaluate(() => {
    const hidden = [false, false, false, true]; // at each attempt, and seen again soon
    const again = () => document.dispatchEvent(new Event("visibilitychange"));
    const get = () => hidden.shift() && Boolean(setTimeout(again));
    Object.defineProperty(document, "hidden", { get });
  });
  await watched(page, "/async/pretended");
  assert.deepEqual(looks.map((look) => look.url.includes("wait=")), [false, true, false, false, true]);
});

test("a server that fails to hold alone is asked no more often for that", LIMIT, async () => {
  const { page } = await visit();
  const looks = [];
  await page.route("**/async/pretended*", (route) => {
    looks.push(performance.now());
    if (route.request().url().includes("wait=")) return route.abort();
    return told(route, { retryAfter: 3, done: looks.length > 3 });
  });
  await watched(page, "/async/pretended");
  assert.ok(looks[3] - looks[2] > 2900, looks);
});

test("a page reloaded in mid-job goes on from the stored address", LIMIT, async () => {
  const { page } = await visit();
  await page.evaluate(() => {
    const onStart = (location) => sessionStorage.setItem("job", location);
    const body = { seconds: 3, result: "kept" };
    client.start("/probe/work", { body, onStart }).catch(() => {});
  });
  await until(() => page.evaluate(() => sessionStorage.getItem("job")));
  await page.reload();
  const result = await page.evaluate(async () => {
    const address = document.querySelector("script[src*='client.js']").src;
    const { watch } = await import(address);
    return watch(sessionStorage.getItem("job"));
  });
  assert.equal(result.result, "kept");
});

test("two tabs see the same end", LIMIT, async () => {
  const first = await visit();
  const path = await server.job("work", { seconds: 3 });
  const page = await first.opened("/probe?src=" + path);
  const second = await first.opened("/probe?src=" + path);
  for (const tab of [page, second]) {
    await until(async () => (await tab.locator("[part=status]").innerText()) === "Finished");
  }
});

/** Have fetch begin its answers at once; the page calls `send` for each part of them. */
const slowly = () => {
  globalThis.fetches = 0;
  globalThis.fetch = (url, { signal }) => {
    globalThis.fetches += 1;
    const start = (body) => {
      signal.addEventListener("abort", () => body.error(signal.reason));
      globalThis.send = (text) => body.enqueue(new TextEncoder().encode(text));
      globalThis.end = () => body.close();
    };
    const headers = { "Content-Type": "application/json" };
    return Promise.resolve(new Response(new ReadableStream({ start }), { headers }));
  };
};

/** Have the page watch a job that is answered slowly. */
async function watchSlowly() {
  const { page } = await visit();
  await page.clock.install();
  await page.evaluate(slowly);
  await page.evaluate(() => void (globalThis.found = client.watch("/async/slow")));
  return page;
}

test("a document that takes a minute to arrive is read to its end", LIMIT, async () => {
  const page = await watchSlowly();
  for (const part of ['{"status": "successful"', ', "done": true', ', "result": 7, "links": []}']) {
    await page.clock.fastForward(19_000);
    await page.evaluate((text) => send(text), part);
  }
  await page.clock.fastForward(19_000);
  await page.evaluate(() => end());
  assert.equal(await page.evaluate(() => found), 7);
  assert.equal(await page.evaluate(() => fetches), 1);
});

test("an answer without a stream is read too", LIMIT, async () => {
  const { page } = await visit();
  const result = await page.evaluate(() => {
    const headers = new Headers({ "Content-Type": "application/json" });
    const text = async () => '{"status": "successful", "done": true, "result": 7, "links": []}';
    globalThis.fetch = async () => ({ ok: true, status: 200, headers, text });
    const late = new Promise((resolve) => setTimeout(resolve, 5000));
    return Promise.race([client.watch("/async/plain"), late]);
  });
  assert.equal(result, 7);
});

test("a document that stops arriving is asked for again", LIMIT, async () => {
  const page = await watchSlowly();
  await page.evaluate(() => send('{"status": '));
  await page.clock.runFor(30_000);
  assert.ok((await page.evaluate(() => fetches)) > 1);
});

test("jobs that wait for each other in the browser's queue are not given up", LIMIT, async () => {
  const { page } = await visit();
  await page.clock.install();
  await page.evaluate(() => {
    globalThis.retries = 0;
    globalThis.fetch = (url, { signal }) =>
      new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
    const onRetry = () => (retries += 1);
    for (let job = 0; job < 100; job += 1) client.watch(`/async/${job}`, { onRetry });
    client.cancel("/async/7").catch(onRetry);
  });
  await page.clock.fastForward(40_000);
  assert.equal(await page.evaluate(() => retries), 0);
});

test("an answer that never comes is given up", { timeout: 60_000 }, async () => {
  const { page } = await visit();
  let times = 0;
  await page.route("**/async/pretended*", (route) => {
    times += 1;
    if (times > 1) {
      const body = JSON.stringify({ status: "successful", done: true, result: 7, links: [] });
      route.fulfill({ contentType: "application/json", body });
    }
  });
  assert.equal((await watched(page, "/async/pretended")).result, 7);
  assert.equal(times, 2);
});

test("a gateway's error page in between is survived and a refusal is not", LIMIT, async () => {
  const { page } = await visit();
  const answers = [
    { status: 502, contentType: "text/html", body: "<h1>Bad gateway" },
    { status: 200, contentType: "application/json", body: '{"status": "runn' },
    { status: 403, contentType: "text/html", body: "<h1>No" },
  ];
  await page.route("**/async/pretended*", (route) => route.fulfill(answers.shift()));
  const { error } = await watched(page, "/async/pretended");
  assert.equal(error.problem.status, 403);
  assert.equal(answers.length, 0);
});

test("a refusal is final though the JSON that it promises is none", LIMIT, async () => {
  const { page, looks } = await visit();
  const refuse = (route) =>
    route.fulfill({ status: 403, contentType: "application/problem+json", body: "Forbidden" });
  await page.route(/async.pretended|probe.work/, refuse, { times: 2 });
  for (const end of [await watched(page, "/async/pretended"), await started(page, "/probe/work")]) {
    assert.deepEqual([end.error.name, end.error.problem?.status], ["JobProblem", 403]);
  }
  assert.equal(looks.length, 1);
});

// -- a second origin --------------------------------------------------------------------------

test("a page of another origin starts, watches and cancels", LIMIT, async () => {
  const there = server.other;
  const preflighted = async () => (await server.preflights()).filter((path) => path.startsWith("/async/"));
  const before = (await preflighted()).length;
  const { page, looks } = await visit({ origin: there });
  const { result, location, seen, at } = await started(page, there + "/probe/work", { seconds: 2 });
  assert.equal(result.result, "done");
  assert.ok(location.startsWith(there));
  assert.ok(at - Date.parse(seen.at(-1).finished) < 500);
  assert.ok(looks.some((look) => look.url.includes("wait=")));
  const refused = await started(page, there + "/probe/refuse", { text: "Not today." });
  assert.equal(refused.error.problem.detail, "Not today.");
  const large = await started(page, there + "/probe/large");
  assert.equal(large.result.length, 200_000);
  const missing = await watched(page, there + "/async/nothing");
  assert.match(missing.error.problem.type, /no-such-job$/);
  // What is watched needs no preflight.
  assert.equal((await preflighted()).length, before);
  const cancelled = await page.evaluate(async (url) => {
    const options = { token, credentials: "include" };
    const onStart = (location) => client.cancel(location, options);
    const wait = client.start(url, { body: { seconds: 20 }, ...options, onStart });
    return wait.catch((error) => error.problem.type);
  }, there + "/probe/work");
  assert.match(cancelled, /dismissed/);
  assert.equal((await preflighted()).length, before + 1);
});

test("the element of another origin shows a job there", LIMIT, async () => {
  const gate = server.gate();
  const path = await server.job("work", { steps: 20, gate }, { Cookie: "user=carol" });
  const there = await visit({ origin: server.other, src: [] });
  await there.context.addCookies([{ name: "user", value: "carol", url: server.other }]);
  await there.page.evaluate((src) => {
    const job = document.createElement("async-job");
    job.setAttribute("credentials", "include");
    job.src = src;
    document.querySelector("main").append(job);
  }, server.other + path);
  await until(async () => Number(await there.part("bar").getAttribute("aria-valuenow")) > 0);
  server.open();
  await until(async () => (await there.text("status")) === "Finished");
});

// -- the element ------------------------------------------------------------------------------

test("the element shows progress, message, end and result", LIMIT, async () => {
  const src = [await server.job("work", { seconds: 3, steps: 30, gate: server.gate() })];
  const shown = await visit({ src });
  await until(async () => Number(await shown.part("bar").getAttribute("aria-valuenow")) > 0);
  assert.match(await shown.text("message"), /^\d+ % Working/);
  assert.equal(await shown.text("status"), "Running");
  assert.equal(await shown.text("title"), "A probe");
  const wide = await shown.part("fill").evaluate((fill) => fill.getBoundingClientRect().width);
  assert.ok(wide > 5);
  await shown.page.evaluate(() => {
    globalThis.done = new Promise((resolve) => addEventListener("jobdone", ({ detail }) => resolve(detail)));
  });
  server.open();
  assert.equal((await shown.page.evaluate(() => done)).status, "successful");
  assert.equal(await shown.text("status"), "Finished");
  assert.equal(await shown.part("bar").getAttribute("aria-valuenow"), "100");
  assert.equal(await shown.part("cancel").isVisible(), false);
  assert.match(await shown.part("result").getAttribute("href"), /\/results$/);
});

test("a bar whose measure becomes known starts from nothing", LIMIT, async () => {
  const shown = await visit();
  const documents = [{ progress: undefined }, { progress: 0 }, { progress: 50 }, { done: true }];
  await shown.page.route("**/async/pretended*", (route) => {
    const body = JSON.stringify({ status: "running", done: false, links: [], ...documents.shift() });
    route.fulfill({ contentType: "application/json", body });
  });
  const moving = await shown.page.evaluate(
    () =>
      new Promise((resolve) => {
        const job = document.createElement("async-job");
        const fill = job.shadowRoot.querySelector("[part=fill]");
        const seen = [];
        job.addEventListener("jobchange", ({ detail }) => {
          seen.push([detail.progress ?? null, fill.getAnimations().map((it) => it.constructor.name)]);
        });
        job.addEventListener("jobdone", () => resolve(seen.slice(0, 3)));
        job.src = "/async/pretended";
        document.querySelector("main").append(job);
      }),
  );
  assert.deepEqual(moving, [[null, ["CSSAnimation"]], [0, []], [50, ["CSSTransition"]]]);
});

test("progress never falls, whichever server answers", LIMIT, async () => {
  const { page } = await visit();
  const documents = [{ progress: 50 }, { progress: 20 }, {}, { progress: 60 }, { done: true }];
  await page.route("**/async/pretended*", (route) => {
    const body = JSON.stringify({ status: "running", done: false, links: [], ...documents.shift() });
    route.fulfill({ contentType: "application/json", body });
  });
  const seen = await page.evaluate(async () => {
    const found = [];
    const onProgress = (job) => found.push(job.progress ?? null);
    const { watch } = await import("/async/client.js");
    await watch("/async/pretended", { onProgress }).catch(() => {});
    return found;
  });
  assert.deepEqual(seen, [50, 50, 50, 60, null]);
});

test("the element offers a file for download", LIMIT, async () => {
  const shown = await visit({ src: [await server.job("file")] });
  const downloading = shown.page.waitForEvent("download");
  await shown.part("result").click();
  assert.equal((await downloading).suggestedFilename(), "table.csv");
});

test("the element shows why a job failed, was cancelled or cannot be seen", LIMIT, async () => {
  const src = [
    await server.job("refuse", { text: "The <b>oracle</b> is closed." }),
    await server.job("crash"),
    "/async/nothing",
  ];
  const shown = await visit({ src });
  await until(async () => (await shown.text("status", 1)) === "Failed");
  await until(async () => (await shown.text("status", 0)) === "Failed");
  assert.equal(await shown.text("error", 0), "The <b>oracle</b> is closed.");
  assert.match(await shown.text("error", 1), /under \w+/);
  await until(async () => (await shown.text("status", 2)) === "Not available");
  assert.equal(await shown.text("error", 2), "There is no such job.");
  assert.equal(await shown.part("bar", 2).isVisible(), false);
});

test("the element is used with the keyboard and keeps the focus", LIMIT, async () => {
  const src = [await server.job("work", { seconds: 20, steps: 100 })];
  const shown = await visit({ src });
  const { page } = shown;
  await until(() => shown.part("cancel").isVisible());
  await page.keyboard.press("Tab");
  assert.equal(await focused(page), "cancel");
  const outline = await shown.part("cancel").evaluate((part) => getComputedStyle(part).outlineStyle);
  assert.equal(outline, "solid");
  await page.keyboard.press("Enter");
  await until(async () => (await shown.text("status")) === "Cancelled");
  assert.equal((await server.status(src[0])).status, "dismissed");
  assert.equal(await focused(page), "job");
});

const focused = (page) => page.evaluate(() => document.activeElement?.shadowRoot?.activeElement?.id);

test("the result has the focus that the cancel button had", LIMIT, async () => {
  const shown = await visit({ src: [await server.job("work", { gate: server.gate() })] });
  await until(() => shown.part("cancel").isVisible());
  await shown.page.keyboard.press("Tab");
  server.open();
  await until(async () => (await shown.text("status")) === "Finished");
  assert.equal(await focused(shown.page), "result");
});

test("a cancel that fails says so and may be repeated", LIMIT, async () => {
  const shown = await visit({ src: [await server.job("work", { gate: server.gate() })] });
  await until(() => shown.part("cancel").isVisible());
  await shown.page.route("**/async/*?only=cancel", (route) => route.abort(), { times: 1 });
  await shown.part("cancel").click();
  await until(async () => /could not be cancelled/.test(await shown.text("status")));
  await shown.part("cancel").click();
  await until(async () => (await shown.text("status")) === "Cancelled");
});

/** What the element says of the job /async/pretended until its end; it may cancel at each change. */
function heard(page, { cancels = false } = {}) {
  return page.evaluate(
    (cancels) =>
      new Promise((resolve) => {
        const job = document.createElement("async-job");
        const said = [];
        const status = job.shadowRoot.querySelector("[role=status]");
        new MutationObserver(() => said.push(status.textContent)).observe(status, { childList: true });
        if (cancels) job.addEventListener("jobchange", () => (globalThis.cancelled = job.cancel()));
        job.addEventListener("jobdone", () => queueMicrotask(() => resolve(said)));
        job.src = "/async/pretended";
        document.querySelector("main").append(job);
      }),
    cancels,
  );
}

test("a cancel that fails is said until the status changes, and anew when it fails again", LIMIT, async () => {
  const { page } = await visit();
  const documents = [{}, {}, { status: "successful", done: true }];
  await page.route("**/async/pretended*", async (route) => {
    if (route.request().method() === "DELETE") return route.fulfill({ status: 403 });
    await page.evaluate(() => globalThis.cancelled);
    return told(route, documents.shift());
  });
  const said = await heard(page, { cancels: true });
  const refused = "It could not be cancelled. Try again.";
  assert.deepEqual(said, ["Running", refused, "", refused, "Finished"]);
});

test("a cancel that a login answers is no end", LIMIT, async () => {
  const shown = await visit({ src: [await server.job("work", { gate: server.gate() })] });
  await until(() => shown.part("cancel").isVisible());
  await shown.page.route("**/async/*?only=cancel", login, { times: 1 });
  await shown.part("cancel").click();
  await until(async () => /could not be cancelled/.test(await shown.text("status")));
  server.open();
  await until(async () => (await shown.text("status")) === "Finished");
});

test("a request that is cut is not said and a server that stays away is", LIMIT, async () => {
  const { page } = await visit();
  const documents = [{}, undefined, {}, undefined, undefined, { status: "successful", done: true }];
  await page.route("**/async/pretended*", (route) => {
    const job = documents.shift();
    return job ? told(route, job) : route.abort();
  });
  const said = await heard(page);
  assert.deepEqual(said, ["Running", "The server does not answer. Trying again.", "Finished"]);
});

test("the live region speaks of changes of state and of nothing else", LIMIT, async () => {
  const shown = await visit();
  const src = await server.job("work", { seconds: 2, steps: 60, gate: server.gate() });
  const saying = shown.page.evaluate(
    (src) =>
      new Promise((resolve) => {
        const job = document.createElement("async-job");
        const said = [];
        const status = job.shadowRoot.querySelector("[role=status]");
        new MutationObserver(() => said.push(status.textContent)).observe(status, { childList: true });
        job.addEventListener("jobdone", () => queueMicrotask(() => resolve(said)));
        job.src = src;
        document.querySelector("main").append(job);
      }),
    src,
  );
  await until(async () => (await server.status(src)).progress > 90);
  await until(async () => (await shown.text("status")) === "Running");
  server.open();
  const said = await saying;
  assert.deepEqual(said.filter((text) => text !== "Waiting"), ["Running", "Finished"]);
});

test("the element can be given another job, another name and another language", LIMIT, async () => {
  const shown = await visit({ src: [await server.job("work", { seconds: 20 })] });
  await until(() => shown.part("cancel").isVisible());
  const next = await server.job("work", { seconds: 0 });
  await shown.page.evaluate((next) => {
    Object.assign(client.texts, { successful: "Fertig", result: "Ergebnis" });
    const job = document.querySelector("async-job");
    job.src = next;
    job.setAttribute("label", "Bericht");
  }, next);
  await until(async () => (await shown.text("status")) === "Fertig");
  assert.equal(await shown.text("title"), "Bericht");
  assert.equal(await shown.part("cancel").isVisible(), false);
  assert.equal(await shown.text("result"), "Ergebnis");
});

test("a language that comes after the element is that of its button too", LIMIT, async () => {
  const shown = await visit();
  await shown.page.route("**/async/pretended*", (route) => told(route));
  await shown.page.evaluate(() => {
    const src = 'src="/async/pretended"';
    document.querySelector("main").insertAdjacentHTML("beforeend", `<async-job ${src}></async-job>`);
    Object.assign(client.texts, { cancel: "Abbrechen" });
  });
  await until(() => shown.part("cancel").isVisible());
  assert.equal(await shown.text("cancel"), "Abbrechen");
});

test("an address that was set before the client came is used", LIMIT, async () => {
  const shown = await visit();
  const src = await server.job("work", { seconds: 0 });
  const text = await shown.page.evaluate(async (src) => {
    const frame = document.createElement("iframe");
    document.body.append(frame);
    const job = frame.contentDocument.createElement("async-job");
    Object.defineProperty(job, "src", { value: src, writable: true, configurable: true, enumerable: true });
    document.querySelector("main").append(job);
    await customElements.whenDefined("async-job");
    return job.getAttribute("src");
  }, src);
  assert.equal(text, src);
  await until(async () => (await shown.text("status")) === "Finished");
});

test("the element needs no trust in markup", LIMIT, async () => {
  const { page } = await visit();
  const path = await server.job("work", { seconds: 0.1 });
  await page.route("**/strict", (route) =>
    route.fulfill({
      contentType: "text/html",
      headers: { "Content-Security-Policy": "default-src 'self'; require-trusted-types-for 'script'" },
      body: `<script type="module" src="/async/client.js"></script><async-job src="${path}"></async-job>`,
    }),
  );
  await page.goto(`${server.origin}/strict`);
  await page.locator('async-job [part="status"]', { hasText: "Finished" }).waitFor({ timeout: 10_000 });
});

test("an element that is moved at each news asks no more often for that", LIMIT, async () => {
  const { page, looks } = await visit({ src: [await server.job("work", { seconds: 2 })] });
  const ends = await page.evaluate(async () => {
    let ends = 0;
    const move = ({ target }) => document.querySelector("main").append(target);
    document.addEventListener("jobchange", move);
    await new Promise((resolve) => {
      document.addEventListener("jobdone", (event) => {
        move(event);
        ends += 1;
        resolve();
      });
    });
    await fetch("/probe"); // time enough for another look
    return ends;
  });
  assert.equal(ends, 1);
  assert.ok(looks.length < 8, `${looks.length} looks`);
});

test("an element that is renamed while it is moved has the new name", LIMIT, async () => {
  const shown = await visit({ src: [await server.job("work", { seconds: 0 })] });
  await until(async () => (await shown.text("status")) === "Finished");
  await shown.page.evaluate(() => {
    const job = document.querySelector("async-job");
    const { parentNode } = job;
    job.remove();
    job.setAttribute("label", "Bericht");
    parentNode.append(job);
  });
  assert.equal(await shown.text("title"), "Bericht");
});

test("an element that was refused asks with new headers when it is put in place again", LIMIT, async () => {
  const shown = await visit();
  await shown.page.route("**/async/pretended*", toldIfAuthorized);
  await shown.page.evaluate(async () => {
    const job = document.createElement("async-job");
    const refused = new Promise((resolve) => job.addEventListener("joberror", resolve));
    job.src = "/async/pretended";
    document.querySelector("main").append(job);
    await refused;
    job.headers = { Authorization: "Bearer new" };
    document.querySelector("main").append(job);
  });
  await until(async () => (await shown.text("status")) === "Finished");
});

test("an element has headers before they are given, as frameworks that set properties ask", LIMIT, async () => {
  const shown = await visit();
  await shown.page.route("**/async/pretended*", toldIfAuthorized);
  await shown.page.evaluate(() => {
    const job = document.createElement("async-job");
    if ("headers" in job) job.headers = { Authorization: "Bearer x" };
    job.src = "/async/pretended";
    document.querySelector("main").append(job);
  });
  await until(async () => (await shown.text("status")) === "Finished");
});

test("an element may be given null for headers, as frameworks give it for none", LIMIT, async () => {
  const shown = await visit();
  await shown.page.route("**/async/pretended*", (route) =>
    told(route, { status: "successful", done: true }),
  );
  await shown.page.evaluate(() => {
    const job = document.createElement("async-job");
    job.headers = null;
    job.src = "/async/pretended";
    document.querySelector("main").append(job);
  });
  await until(async () => (await shown.text("status")) === "Finished");
});

test("an element that was given another job when it was refused can be moved with it", LIMIT, async () => {
  const shown = await visit();
  await shown.page.route("**/async/refused*", (route) => route.fulfill({ status: 404 }));
  const path = await server.job("work", { seconds: 3 });
  await shown.page.evaluate((path) => {
    const job = document.createElement("async-job");
    job.addEventListener("joberror", () => (job.src = path));
    job.src = "/async/refused";
    document.querySelector("main").append(job);
  }, path);
  await until(async () => (await shown.text("status")) === "Running");
  const isShown = await shown.page.evaluate(() => {
    const job = document.querySelector("async-job");
    document.querySelector("main").append(job);
    return job.job !== null;
  });
  assert.ok(isShown);
});

test("an element that is taken away stops asking", LIMIT, async () => {
  const shown = await visit({ src: [await server.job("work", { gate: server.gate() })] });
  await until(() => shown.looks.length > 1);
  await shown.page.evaluate(() => document.querySelector("async-job").remove());
  const count = shown.looks.length;
  await sleep(2500);
  assert.equal(shown.looks.length, count);
});

test("nothing moves where motion is unwelcome", LIMIT, async () => {
  const src = [await server.job("still", { gate: server.gate() })];
  for (const [reducedMotion, moving] of [["reduce", 0], ["no-preference", 1]]) {
    const shown = await visit({ src, reducedMotion });
    await until(() => shown.part("cancel").isVisible());
    const animations = await shown.part("fill").evaluate((fill) => fill.getAnimations().length);
    assert.equal(animations, moving);
  }
});

// -- for everybody ----------------------------------------------------------------------------

/** Return what axe-core finds, in a sentence each. */
async function findings(page) {
  await page.evaluate(axe.source);
  // It takes a page without a background for white, whatever the scheme.
  await page.evaluate(() => {
    if (!document.styleSheets.length) document.documentElement.style.background = "Canvas";
  });
  const { violations, incomplete } = await page.evaluate(() => globalThis.axe.run());
  const wrong = [...violations, ...incomplete.filter(({ id }) => id === "color-contrast")];
  return wrong.flatMap(({ id, nodes }) => nodes.map((node) => `${id}: ${node.html} ${node.any[0]?.message}`));
}

for (const colorScheme of ["light", "dark"]) {
  test(`axe finds nothing in any state of the element, ${colorScheme}`, LIMIT, async () => {
    const src = [
      await server.job("work", { steps: 300, gate: server.gate() }),
      await server.job("still", { gate: server.gate() }),
      await server.job("refuse", { text: "It is closed." }),
      await server.job("file"),
      await server.job("large"),
      "/async/nothing",
    ];
    const shown = await visit({ src, colorScheme });
    await until(async () => Number(await shown.part("bar").getAttribute("aria-valuenow")) > 0);
    await until(async () => (await shown.text("status", 4)) === "Finished");
    assert.deepEqual(await findings(shown.page), []);
    await picture(shown.page, `element-${colorScheme}`);
    await shown.context.setOffline(true);
    await until(async () => /Trying again/.test(await shown.text("status", 0)));
    assert.deepEqual(await findings(shown.page), []);
    await shown.context.setOffline(false);
    for (const index of [0, 1]) await shown.part("cancel", index).click();
    await until(async () => (await shown.text("status", 1)) === "Cancelled");
    assert.deepEqual(await findings(shown.page), []);
    await picture(shown.page, `element-ended-${colorScheme}`);
  });

  test(`axe finds nothing on the demo's page of a job, ${colorScheme}`, LIMIT, async () => {
    const { page } = await demo("start/count", { colorScheme });
    await until(() => page.locator("[part=cancel]").isVisible());
    assert.deepEqual(await findings(page), []);
    await picture(page, `demo-${colorScheme}`);
    await page.locator("[part=cancel]").click();
    await page.getByRole("heading", { name: "The job was cancelled" }).waitFor();
    assert.deepEqual(await findings(page), []);
  });
}

test("the element and the demo fit a narrow window", LIMIT, async () => {
  const viewport = { width: 320, height: 640 };
  const path = await server.job("work", { steps: 80, gate: server.gate() });
  const shown = await visit({ src: [path, "/async/nothing"], viewport });
  await until(() => shown.part("cancel").isVisible());
  const { page } = await demo("start/count", { viewport });
  await until(() => page.locator("[part=cancel]").isVisible());
  for (const [name, narrow] of [["element", shown.page], ["demo", page]]) {
    await picture(narrow, `${name}-narrow`);
    const { scrollWidth, clientWidth } = await narrow.evaluate(() => {
      const { scrollWidth, clientWidth } = document.documentElement;
      return { scrollWidth, clientWidth };
    });
    assert.ok(scrollWidth <= clientWidth, name);
  }
});

/** Leave a picture to look at where somebody wants one. */
async function picture(page, name) {
  const { PICTURES } = process.env;
  if (PICTURES) await page.screenshot({ path: `${PICTURES}/${name}.png` });
}

// -- the demo ---------------------------------------------------------------------------------

/** Press a button of the demo's first page; the page of the job it starts. */
async function demo(action, options = {}) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const close = async () => {
    // A job that is left behind would keep a worker, and the next job waiting, for half a minute.
    const cancel = page.locator("[part=cancel]");
    if (await cancel.isVisible()) {
      await cancel.click();
      await page.getByRole("heading", { name: "The job was cancelled" }).waitFor();
    }
    await context.close();
  };
  visits.push({ complaints: [], close });
  page.on("console", (line) => {
    if (line.type() === "error") visits.at(-1).complaints.push(line.text());
  });
  await page.goto(server.origin + "/");
  await page.locator(`form[action="/${action}"] button`).click();
  await page.waitForURL("**/jobs/**");
  return { page, context };
}

test("the demo shows a job's progress", LIMIT, async () => {
  const { page } = await demo("start/count");
  const bar = page.getByRole("progressbar");
  await until(async () => Number(await bar.getAttribute("aria-valuenow")) > 0);
  await page.getByRole("heading", { name: "The job is running" }).waitFor();
  assert.match(await page.locator("[part=message]").innerText(), /Step \d+ of 60/);
});

test("the demo shows the server's own words in the end", LIMIT, async () => {
  const { page } = await demo("start/sample");
  await page.getByRole("heading", { name: "The job has finished" }).waitFor({ timeout: 60_000 });
  await page.getByText("rows are stored").waitFor();
  assert.equal(await page.getByRole("status").innerText(), "The job has finished");
});

test("the demo's job is cancelled with the keyboard and its counter stands still", LIMIT, async () => {
  const { page } = await demo("start/count");
  await page.locator("[part=cancel]").waitFor();
  await page.locator("[part=cancel]").focus();
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { name: "The job was cancelled" }).waitFor();
  assert.match(await page.locator("#job").innerText(), /The counter stands at 0/);
  assert.equal(await page.evaluate(() => document.activeElement.id), "job");
});

test("the demo's failed job shows its reason", LIMIT, async () => {
  const { page } = await demo("start/fail");
  await page.getByText("The oracle is closed on weekends.").waitFor();
});

test("the demo works without script", LIMIT, async () => {
  const { page } = await demo("start/count", { javaScriptEnabled: false });
  await page.getByRole("progressbar").waitFor();
  await page.getByRole("button", { name: "Cancel" }).click();
  await page.getByRole("heading", { name: "The job was cancelled" }).waitFor();
});
