/** The demo as people see it: every page, on waitress, with its own users and two origins. */

import assert from "node:assert/strict";
import { after, afterEach, before, test } from "node:test";
import axe from "axe-core";
import { launch, Server } from "./stage.mjs";

const LIMIT = { timeout: 90_000 };
const SCHEMES = ["light", "dark"];

/** The demo alone, its second port another origin. */
class Demo extends Server {
  configure() {
    this.settings = {
      ...this.settings,
      "pyramid.includes": "",
      "demo.port": this.port,
      "async.cors.origins": this.other,
      "async.cors.credentials": "false",
    };
    super.configure();
  }

  answers() {
    return fetch(`${this.origin}/`).then((answer) => answer.ok, () => false);
  }
}

let browser, server;
const contexts = [];
const complaints = [];

before(async () => {
  [browser, server] = await Promise.all([launch(), Demo.started()]);
});

afterEach(async () => {
  await Promise.all(contexts.splice(0).map((context) => context.close()));
  assert.deepEqual(complaints.splice(0), []);
});

after(async () => {
  await browser?.close();
  await server?.close();
});

async function visitor(options = {}) {
  const context = await browser.newContext(options);
  contexts.push(context);
  return context;
}

async function opened(context, path, origin = server.origin) {
  const page = await context.newPage();
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("console", (line) => {
    if (/Content Security Policy|CORS/.test(line.text())) complaints.push(line.text());
  });
  await page.goto(origin + path);
  return page;
}

/** Send a form and wait for the page it leads to. */
async function pressed(page, path, action, leadsTo = "**/jobs/**") {
  await page.goto(server.origin + path);
  await page.locator(`form[action="${action}"] button`).click();
  await page.waitForURL(leadsTo);
}

// It does not know the background of text in a chart, nor take a single sign for text. Both have
// the colours of other text, which it looks at.
const UNKNOWN = ["imgNode", "nonBmp", "shortTextContent"];

/** Return what axe-core finds, in a sentence each. */
async function findings(page) {
  await page.evaluate(axe.source);
  const { violations, incomplete } = await page.evaluate(() => globalThis.axe.run());
  const contrast = incomplete.filter(({ id }) => id === "color-contrast").flatMap(({ nodes }) => nodes);
  const where = new URL(page.url()).pathname;
  return [
    ...violations.flatMap(({ id, nodes }) => nodes.map(({ html }) => `${where} ${id}: ${html}`)),
    ...contrast
      .filter(({ any }) => !UNKNOWN.includes(any[0]?.data?.messageKey))
      .map(({ html, any }) => `${where}: ${html} ${any[0]?.message}`),
  ];
}

/** A visitor with something to see on every page; the pages. */
async function everyPage(options) {
  const context = await visitor(options);
  const page = await opened(context, "/");
  await pressed(page, "/", "/start/sample");
  await page.getByRole("link", { name: "Search the rows" }).waitFor({ timeout: 60_000 });
  const paths = ["/", new URL(page.url()).pathname, "/nothing"];
  await page.getByRole("link", { name: "Search the rows" }).click();
  paths.push(new URL(page.url()).pathname);
  await page.goto(server.origin + "/");
  await page.getByLabel("Text").fill("without_blanks_".repeat(9));
  await page.getByRole("button", { name: "Echo it" }).click();
  await page.waitForURL("**/jobs/**");
  paths.push(new URL(page.url()).pathname);
  await page.getByText("The answer: ").waitFor();
  const name = `${"without_blanks_".repeat(6)}.csv`;
  await page.goto(server.origin + "/");
  await page.locator("#file").setInputFiles({ name, mimeType: "text/csv", buffer: Buffer.from("") });
  await page.getByRole("button", { name: "Import" }).click();
  await page.getByText("The file is empty").waitFor();
  await pressed(page, "/", "/start/fail");
  await page.getByText("The oracle is closed").waitFor();
  paths.push(new URL(page.url()).pathname);
  await page.goto(server.origin + "/characters");
  const build = page.locator('form[action="/characters/index"] button');
  if (await build.count()) await build.click(); // else another visitor has
  await pressed(page, "/", "/start/count");
  return { context, page, paths: [...paths, "/characters?q=arrow", "/characters", "/jobs"] };
}

async function called(context, text) {
  const page = await opened(context, "/elsewhere", server.other);
  await page.getByLabel("Text").fill(text);
  await page.getByRole("button", { name: "Call echo" }).click();
  return page;
}

test("axe finds nothing on any page of the demo", LIMIT, async () => {
  for (const colorScheme of SCHEMES) {
    const { context, page, paths } = await everyPage({ colorScheme });
    for (const path of paths) {
      await page.goto(server.origin + path);
      assert.deepEqual(await findings(page), [], colorScheme);
    }
    const elsewhere = await called(context, "Hello");
    await elsewhere.getByText("The answer: “Hello”.").waitFor();
    assert.deepEqual(await findings(elsewhere), [], colorScheme);
  }
});

test("every page of the demo fits a narrow window", LIMIT, async () => {
  const { context, page, paths } = await everyPage({ viewport: { width: 320, height: 640 } });
  const elsewhere = await called(context, "Hello");
  await elsewhere.locator("[part=bar]").waitFor();
  const tooWide = () => document.documentElement.scrollWidth - innerWidth;
  assert.ok((await elsewhere.evaluate(tooWide)) <= 0, "elsewhere");
  for (const path of paths) {
    await page.goto(server.origin + path);
    assert.ok((await page.evaluate(tooWide)) <= 0, path);
  }
});

test("a page of another origin calls echo and shows the answer after five seconds", LIMIT, async () => {
  const begun = Date.now();
  const page = await called(await visitor(), "Is there anybody?");
  await page.getByText("The answer: “Is there anybody?”.").waitFor();
  assert.ok(Date.now() - begun >= 5_000);
  const [, asked] = /asked (\d+) times/.exec(await page.locator("#answer").innerText());
  assert.ok(asked >= 2 && asked <= 10, asked);
  assert.equal(await page.locator("#said li").filter({ hasText: /^← (?!job)/ }).count(), Number(asked));
  assert.match(await page.locator("#said").innerText(), /"method":"echo"/);
});

test("a page of another origin cancels its job by JSON-RPC", LIMIT, async () => {
  const page = await called(await visitor(), "Never mind");
  await page.getByRole("button", { name: "Cancel by JSON-RPC" }).click();
  await page.locator("[part=status]").getByText("Cancelled").waitFor();
  assert.ok(!(await page.locator("#answer").innerText()).includes("Never mind"));
});

test("a page of another origin offers to cancel only what can be cancelled", LIMIT, async () => {
  const page = await opened(await visitor(), "/elsewhere", server.other);
  const cancel = page.getByRole("button", { name: "Cancel by JSON-RPC" });
  const call = page.getByRole("button", { name: "Call echo" });
  await page.route("**/rpc", (route) => route.abort(), { times: 1 });
  await call.click();
  await page.locator("#answer").getByText("Failed to fetch").waitFor();
  assert.equal(await cancel.isVisible(), false);
  await call.click();
  await cancel.click();
  await page.locator("#answer").getByText("The page asked").waitFor();
  assert.equal(await cancel.isVisible(), false);
  assert.equal(await page.evaluate(() => document.activeElement.id), "job");
});

/** Cancel the job that a page shows and let the page fetch its address; the reloads of it. */
const reloadsByCancel = (page) =>
  page.evaluate(async () => {
    const reloads = [];
    navigation.addEventListener("navigate", (event) => reloads.push(event.navigationType));
    await document.querySelector("async-job").cancel();
    await fetch(location.href).catch(() => {});
    return reloads;
  });

test("the page of a job keeps what the element shows where the last page cannot be had", LIMIT, async () => {
  const page = await opened(await visitor(), "/");
  await pressed(page, "/", "/start/count");
  await page.locator("[part=cancel]").waitFor();
  await page.route("**/jobs/*", (route) => route.abort());
  assert.deepEqual(await reloadsByCancel(page), []);
  assert.equal(await page.locator("[part=status]").innerText(), "Cancelled");
});

test("the list of own jobs follows what another window starts", LIMIT, async () => {
  const context = await visitor();
  const list = await opened(context, "/jobs");
  const other = await opened(context, "/");
  await list.bringToFront();
  await pressed(other, "/", "/start/fail");
  const item = list.locator("#jobs li");
  await item.waitFor();
  await item.getByText("The oracle is closed").waitFor();
  assert.equal(await list.locator("#empty").isVisible(), false);
  assert.equal(await list.locator("#timeline .bar.failed").count(), 1);
});

test("the list of own jobs asks once at a time where no answer comes", LIMIT, async () => {
  const page = await (await visitor()).newPage();
  await page.clock.install();
  await page.addInitScript(() => {
    AbortSignal.timeout = (delay) => {
      const stop = new AbortController();
      setTimeout(() => stop.abort(), delay);
      return stop.signal;
    };
  });
  const isLook = (request) => request.url().includes("/async?");
  const underway = new Set();
  let most = 0;
  page.on("request", (request) => {
    if (isLook(request)) most = Math.max(most, underway.add(request).size);
  });
  page.on("requestfailed", (request) => underway.delete(request));
  await page.goto(server.origin + "/jobs");
  await page.route("**/async?*", () => {}); // never answered
  const again = () => page.waitForRequest(isLook);
  for (let looks = 0; looks < 2; looks += 1) {
    const look = again();
    for (let seconds = 0; seconds < 25; seconds += 5) await page.clock.runFor(5_000);
    await look;
  }
  assert.equal(most, 1);
});

test("a job in the list is cancelled with the keyboard and keeps the focus", LIMIT, async () => {
  const page = await opened(await visitor(), "/");
  await pressed(page, "/", "/start/count");
  await page.goto(server.origin + "/jobs");
  const cancel = page.locator("[part=cancel]");
  await cancel.waitFor();
  for (let presses = 0; presses < 30; presses += 1) {
    await page.keyboard.press("Tab");
    if (await cancel.evaluate((button) => button.matches(":focus"))) break;
  }
  await page.keyboard.press("Enter");
  await page.locator("#jobs .status.dismissed").waitFor();
  assert.match(await page.evaluate(() => document.activeElement.id), /^job-/);
  assert.match(await page.locator("#announcement").textContent(), /Count slowly\s+cancelled/);
});

test("the list of own jobs comes to its end without script", LIMIT, async () => {
  const page = await opened(await visitor({ javaScriptEnabled: false }), "/");
  await page.getByLabel("Text").fill("No script");
  await page.getByRole("button", { name: "Echo it" }).click();
  await page.goto(server.origin + "/jobs");
  await page.getByRole("progressbar").waitFor();
  await page.getByText("finished", { exact: true }).waitFor();
  await page.getByRole("link", { name: "Echo" }).click();
  await page.getByText("No script").waitFor();
});

test("the index's end waits for whoever types a query", LIMIT, async () => {
  const own = await Demo.started();
  try {
    const page = await (await visitor()).newPage();
    await page.goto(own.origin + "/characters");
    await page.getByRole("button", { name: "Build it" }).click();
    await page.locator("[part=message]").filter({ hasText: /,\d+ of/ }).waitFor();
    await page.goto(own.origin + "/characters");
    await page.locator("[part=cancel]").waitFor();
    await page.locator("#q").fill("arr");
    assert.deepEqual(await reloadsByCancel(page), []);
    assert.equal(await page.locator("[part=status]").innerText(), "Cancelled");
    await page.locator("#q").blur();
    await page.locator("async-job").dispatchEvent("jobdone");
    await page.getByText("its job was cancelled").waitFor();
  } finally {
    await own.close();
  }
});

test("the index goes on where a killed server left it and the page sees its end", LIMIT, async () => {
  const own = await Demo.started();
  try {
    const page = await (await visitor()).newPage();
    await page.goto(own.origin + "/characters");
    await page.getByRole("button", { name: "Build it" }).click();
    await page.locator("[part=message]").filter({ hasText: /,\d+ of/ }).waitFor();
    await own.stop("SIGKILL");
    await own.start();
    await page.getByText("All characters can be found.").waitFor({ timeout: 60_000 });
    await page.goto(own.origin + "/characters?q=arrow");
    const [, first, second] = /went on: ([\d,]+) \+ ([\d,]+) characters/.exec(await page.locator("#main").innerText());
    const number = (text) => Number(text.replaceAll(",", ""));
    assert.ok(number(first) >= 1_000, first);
    const [, total] = /It is complete: ([\d,]+) characters/.exec(await page.locator("#main").innerText());
    assert.equal(number(first) + number(second), number(total));
    assert.ok((await page.locator("figure svg .bar").count()) >= 2);
  } finally {
    await own.close();
  }
});
