// Open the page of examples/browser in headless Chromium, use it, and print what it showed as JSON:
//
//     node tests/browser.mjs CHROMIUM URL [--screenshot FILE] IMAGE ...
//
// `seconds` go from opening the page to its first prediction. Without images, it prints them and errors only.
import { createRequire } from "node:module";

const { default: puppeteer } = await import(createRequire(new URL("../examples/browser/", import.meta.url)).resolve("puppeteer-core"));
let [executablePath, url, ...images] = process.argv.slice(2);
const screenshot = images[0] === "--screenshot" ? images.splice(0, 2)[1] : null;
const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox"] });

// Open the page, and return it with the list to which it adds what goes wrong.
async function open(prepare = () => {}, address = url) {
  const page = await browser.newPage();
  const errors = [];
  page.on("console", (message) => ["error", "warn"].includes(message.type()) && errors.push(message.text()));
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("request", (request) => {
    const own = [url, "blob:", "data:"].some((start) => request.url().startsWith(start));
    if (!own) errors.push(`a request to ${request.url()}`);
  });
  await page.setViewport({ width: 1100, height: 900 });
  await prepare(page);
  await page.goto(address);
  return { page, errors };
}

// Answer requests for this file with `response`.
async function replace(page, name, response) {
  await page.setRequestInterception(true);
  page.on("request", (request) => (request.url().endsWith(name) ? request.respond(response) : request.continue()));
}

// Move the slider through all policies and drop these files in two parts, all at once, as a quick user would.
async function hurry(page, names) {
  await page.evaluate(async (names) => {
    const canvas = new OffscreenCanvas(3000, 2000);
    canvas.getContext("2d").fillRect(0, 0, 1500, 2000);
    const image = await canvas.convertToBlob();
    const files = names.map((name) => new File([name.endsWith("png") ? image : "text"], name));
    const effort = document.getElementById("effort");
    for (let n = 0; n <= Number(effort.max); n++) {
      effort.value = n;
      effort.dispatchEvent(new Event("input"));
    }
    for (const part of [files.slice(0, 3), files.slice(3)]) {
      const drop = Object.assign(new Event("drop", { cancelable: true }), { dataTransfer: { files: part } });
      document.dispatchEvent(drop);
    }
  }, names);
}

// Do something that classifies images, and return what the page shows afterwards.
async function shown(page, action) {
  const round = await page.evaluate(() => Number(document.body.dataset.round ?? 0));
  await action();
  await page.waitForFunction((before) => Number(document.body.dataset.round ?? 0) > before, {}, round);
  return page.evaluate(() => {
    const text = (id) => document.getElementById(id).textContent;
    return {
      policy: Number(document.getElementById("effort").value),
      cards: [...document.querySelectorAll("#results li")].map((card) => ({
        ...card.dataset,
        note: card.querySelector(".note").textContent,
      })),
      bars: [...document.querySelectorAll("#bars .count")].map((count) => Number(count.textContent)),
      saved: [text("saved-operations"), text("saved-time")],
      summary: text("summary"),
      problem: text("problem"),
    };
  });
}

async function problem(prepare, address) {
  const { page } = await open(prepare, address);
  const line = await page.waitForSelector("#problem:not([hidden])");
  return line.evaluate((found) => found.textContent);
}

// In the page: note the milliseconds from its opening to its first prediction.
function noteFirstPrediction() {
  const observer = new MutationObserver(() => {
    if (!document.querySelector("#results li[data-class]")) return;
    globalThis.firstPrediction = performance.now();
    observer.disconnect();
  });
  observer.observe(document, { subtree: true, childList: true, attributes: true });
}

// Use the page as a visitor would, open it in ways that fail, and return what it showed.
async function use(page) {
  const cleared = await shown(page, () => page.click("#clear"));
  const input = await page.$("#files");
  const views = [await shown(page, () => input.uploadFile(...images))];
  await page.focus("#effort");
  for (const key of ["Home", "End"]) views.push(await shown(page, () => page.keyboard.press(key)));
  const hurried = await shown(page, () => hurry(page, ["first.png", "notes.txt", "second.png", "empty.gif", "third.png"]));
  const stopped = await shown(page, () =>
    page.evaluate(() => {
      document.getElementById("pictures").click();
      document.getElementById("clear").click();
    }),
  );
  const withoutNames = await page.evaluate(() => {
    const controls = [...document.querySelectorAll("input, button, img")];
    return controls.filter((x) => !(x.labels?.length || x.textContent || x.alt)).map((x) => x.outerHTML);
  });
  await page.setViewport({ width: 360, height: 640 });
  const overflows = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
  const problems = {
    webassembly: await problem((other) => other.evaluateOnNewDocument(() => delete globalThis.WebAssembly)),
    block: await problem((other) => replace(other, "block3.onnx", { status: 404 })),
    version: await problem((other) => replace(other, "network.json", { body: '{"format": "another 1"}' })),
    pictures: await problem((other) => replace(other, "apple.svg", { status: 404 })),
    file: await problem(() => {}, new URL("../examples/browser/index.html", import.meta.url).href),
  };
  return { cleared, views, hurried, stopped, withoutNames, overflows, problems };
}

try {
  const { page, errors } = await open((opened) => opened.evaluateOnNewDocument(noteFirstPrediction));
  const pictures = await shown(page, () => {});
  const seconds = await page.evaluate(() => Math.round(globalThis.firstPrediction) / 1000);
  if (screenshot) await page.screenshot({ path: screenshot });
  console.log(JSON.stringify(images.length ? { seconds, errors, pictures, ...(await use(page)) } : { seconds, errors }));
} finally {
  await browser.close();
}
