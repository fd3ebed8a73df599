/** The demo on waitress, with the jobs of probe.py, and a browser to look at it. */

import { spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { chromium } from "playwright-core";

const { CHECKOUT, CHROMIUM = "/usr/bin/chromium", PYTHON = "python3" } = process.env;
const FLAGS =
  "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking" +
  " --disable-component-update --disable-sync";

export { sleep };

export const launch = () =>
  chromium.launch({ executablePath: CHROMIUM, args: FLAGS.split(" "), headless: true });

export async function until(what, seconds = 20) {
  for (const end = Date.now() + seconds * 1000; Date.now() < end; await sleep(20)) {
    const value = await what();
    if (value) return value;
  }
  throw new Error(`waited ${seconds} s in vain for ${what}`);
}

function freePort() {
  return new Promise((resolve) => {
    const server = createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

/** The server, which can be stopped and started again at the same address with the same data. */
export class Server {
  constructor(settings) {
    this.settings = settings;
    this.folder = mkdtempSync(join(tmpdir(), "client-"));
    this.output = "";
    this.gates = [];
  }

  static async started(settings = {}) {
    const server = new this(settings);
    [server.port, server.second] = [await freePort(), await freePort()];
    server.configure();
    await server.start();
    return server;
  }

  /** The page's own origin, and the other one by which the same server and its cookies are reached. */
  get origin() {
    return `http://127.0.0.1:${this.port}`;
  }

  get other() {
    return `http://127.0.0.1:${this.second}`;
  }

  configure() {
    const { threads = 8, ...settings } = this.settings;
    const own = {
      "pyramid.includes": "probe",
      "async.cors.origins": this.origin,
      "async.cors.credentials": "true",
      // A server that was killed is found dead soon.
      "async.heartbeat": 0.2,
      "async.lease": 1,
      "async.maintenance_interval": 0.5,
      "async.workers": 4,
      ...settings,
    };
    const lines = Object.entries(own).map(([name, value]) => `${name} = ${value}\n`);
    const ini = readFileSync(join(CHECKOUT, "development.ini"), "utf-8")
      .replace(/^([\w.]+) = .*\n/gm, (line, name) => (name in own ? "" : line))
      .replace(/^threads = .*/m, `threads = ${threads}`)
      .replace(/^listen = .*http_port.*/m, `listen = 127.0.0.1:${this.port} 127.0.0.1:${this.second}`)
      .replace("\n[server:main]", `${lines.join("")}\n[server:main]`);
    writeFileSync(join(this.folder, "development.ini"), ini);
  }

  async start() {
    const ini = join(this.folder, "development.ini");
    const pserve = ["-W", "ignore", "-m", "pyramid.scripts.pserve", "--server-name", "port", ini];
    const PYTHONPATH = [CHECKOUT, join(CHECKOUT, "tests", "browser")].join(":");
    this.process = spawn(PYTHON, [...pserve, "http_port=0"], {
      env: { ...process.env, PYTHONPATH },
      stdio: ["ignore", "pipe", "pipe"],
    });
    for (const stream of [this.process.stdout, this.process.stderr]) {
      stream.on("data", (text) => (this.output += text));
    }
    this.gone = new Promise((resolve) => this.process.once("exit", resolve));
    await until(() => this.answers(), 40).catch((error) => {
      throw new Error(`${error.message}\n${this.output}`);
    });
  }

  answers() {
    return fetch(`${this.origin}/probe`).then((answer) => answer.ok, () => false);
  }

  async stop(signal = "SIGTERM") {
    this.process.kill(signal);
    await this.gone;
  }

  async close() {
    await this.stop("SIGKILL");
    rmSync(this.folder, { recursive: true, force: true });
  }

  /** A name for the `gate` of a job, which does not end before it is opened. */
  gate() {
    this.gates.push(join(this.folder, `gate-${randomUUID()}`));
    return this.gates.at(-1);
  }

  /** Open all gates. */
  open() {
    for (const gate of this.gates.splice(0)) writeFileSync(gate, "");
  }

  /** Start a job from outside of the browser; return its path. */
  async job(name, options = {}, headers = {}) {
    const answer = await fetch(`${this.origin}/probe/${name}`, {
      method: "POST",
      body: JSON.stringify(options),
      headers: { "Content-Type": "application/json", ...headers },
    });
    return new URL(answer.headers.get("Location")).pathname;
  }

  /** Paths that preflights came for; the browser's tools tell of none. */
  async preflights() {
    return (await fetch(`${this.origin}/preflights`)).json();
  }

  async status(path) {
    return (await fetch(this.origin + path)).json();
  }

  finished(path, seconds) {
    return until(async () => {
      const job = await this.status(path);
      return job.done && job;
    }, seconds);
  }
}

/** A page with the client imported as `client`, its looks counted. */
export class Visit {
  static async begun(browser, server, { origin = "", src = [], path, ...options } = {}) {
    const visit = new Visit();
    visit.context = await browser.newContext(options);
    visit.server = server;
    visit.page = await visit.opened(path ?? probe(origin, src));
    await visit.imported();
    return visit;
  }

  looks = [];
  complaints = [];

  async opened(path) {
    const page = await this.context.newPage();
    page.on("request", (request) => this.count(request));
    page.on("console", (line) => this.note(line));
    page.on("pageerror", (error) => this.complaints.push(String(error)));
    await page.goto(this.server.origin + path);
    return page;
  }

  count(request) {
    const { pathname } = new URL(request.url());
    if (!/^\/async\/[\w-]+$/.test(pathname)) return;
    this.looks.push({ at: Date.now(), url: request.url() });
  }

  note(line) {
    if (/Content Security Policy|CORS/.test(line.text())) this.complaints.push(line.text());
  }

  async imported() {
    await this.page.evaluate(async (address) => {
      globalThis.client = await import(address);
      globalThis.token = document.querySelector("main").dataset.token;
    }, await this.page.locator("script[src*='client.js']").first().getAttribute("src"));
  }

  /** The parts of the page's element, as a user sees them. */
  part(name, index = 0) {
    return this.page.locator("async-job").nth(index).locator(`[part="${name}"]`);
  }

  text(name, index) {
    return this.part(name, index).innerText();
  }

  async close() {
    await this.context.close();
  }
}

function probe(origin, src) {
  const query = new URLSearchParams(src.map((url) => ["src", origin + url]));
  if (origin) query.set("origin", origin);
  return `/probe?${query}`;
}
