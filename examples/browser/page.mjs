// The page: reads images, runs the network for each, and shows where it left. Exits are numbered from 1 here.
import { Predictor } from "./predictor.mjs";

const RUNTIME = new URL("node_modules/onnxruntime-web/dist/", import.meta.url);
const NETWORK = new URL("network/", import.meta.url);
const PICTURES = [
  ...["apple", "orange", "sunflower", "sea", "mountain", "skyscraper", "cup", "road"],
  ...["traffic_light", "clock", "bottle", "pear", "cloud", "plain", "plate"],
];
const WARM_UP = 5; // runs of every exit before the page opens
const MEASURED = 9; // newest runs of every exit whose median is the time without early exit
const LARGE = 4; // images with more than this many times the pixels per side are called unlike the training images
const UNSURE = 0.5; // below this probability, the image may show none of the classes
const MAX_IMAGES = 500;

const element = (id) => document.getElementById(id);
const percent = (share) => `${Math.round(100 * share)} %`;

class Page {
  constructor(predictor) {
    this.predictor = predictor;
    this.fullTimes = []; // milliseconds of one image through every exit
    this.policies = [...predictor.points].sort((a, b) => a.operations - b.operations);
    this.images = []; // { name, pixels, size: [width, height], card, ... } and the prediction
    this.round = 0; // number of the newest classification; older ones give up
    this.showNetwork();
    this.listen();
  }

  get policy() {
    return this.policies[Number(element("effort").value)];
  }

  get fullMilliseconds() {
    return [...this.fullTimes].sort((a, b) => a - b)[Math.floor(this.fullTimes.length / 2)];
  }

  // Run one image through every exit, for the time that early exit is compared with.
  async measureEveryExit() {
    const { imageSize, numExits } = this.predictor;
    const began = performance.now();
    await this.predictor.predict(new Uint8Array(3 * imageSize ** 2), new Array(numExits).fill(2));
    this.fullTimes = [...this.fullTimes, performance.now() - began].slice(-MEASURED);
  }

  showNetwork() {
    const { classNames, imageSize, numExits } = this.predictor;
    element("network").textContent =
      `A network of ${numExits} exits and ${classNames.length} classes, trained on images of ${imageSize} × ${imageSize} pixels, ` +
      "runs in this page. An image leaves at the first exit that is sure enough; later blocks then cost nothing.";
    element("number-of-classes").textContent = classNames.length;
    element("classes").textContent = classNames.map((name) => name.replaceAll("_", " ")).join(", ");
    for (let exit = 1; exit <= numExits; exit++) {
      const bar = document.createElement("li");
      bar.innerHTML = `<span>Exit ${exit}</span><span class="bar"><span></span></span><span class="count">0</span>`;
      bar.querySelector(".bar span").style.background = exitColour(exit, numExits);
      element("bars").append(bar);
    }
    const effort = element("effort");
    effort.max = this.policies.length - 1;
    const half = this.predictor.operations.at(-1) / 2;
    const distance = (policy) => Math.abs(policy.operations - half);
    effort.value = this.policies.reduce((best, policy, n) => (distance(policy) < distance(this.policies[best]) ? n : best), 0);
    for (const id of ["effort", "files", "pictures", "clear"]) element(id).disabled = false;
  }

  listen() {
    element("effort").addEventListener("input", () => this.classify());
    element("files").addEventListener("change", async ({ target }) => {
      await this.add([...target.files]);
      target.value = "";
    });
    element("pictures").addEventListener("click", () => this.addPictures());
    element("clear").addEventListener("click", () => {
      this.images.forEach((image) => image.card.remove());
      this.images = [];
      this.classify();
    });
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      document.body.classList.add("dropping");
    });
    for (const name of ["dragleave", "drop"]) {
      document.addEventListener(name, () => document.body.classList.remove("dropping"));
    }
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      this.add([...event.dataTransfer.files]);
    });
  }

  async addPictures() {
    const read = async (name) => new File([await fetchBytes(new URL(`pictures/${name}.svg`, import.meta.url))], name, { type: "image/svg+xml" });
    const shown = new Set(this.images.map(({ name }) => name));
    await this.add(await Promise.all(PICTURES.filter((name) => !shown.has(name)).map(read)));
  }

  // Read these files and classify all images.
  async add(files) {
    const unreadable = [];
    for (const file of files.slice(0, MAX_IMAGES - this.images.length)) {
      try {
        this.images.push(await readImage(file, this.predictor));
      } catch {
        unreadable.push(file.name);
      }
    }
    const problems = [];
    if (unreadable.length) problems.push(`These files are no images that this browser reads: ${unreadable.join(", ")}.`);
    if (this.images.length === MAX_IMAGES) problems.push(`The page shows at most ${MAX_IMAGES} images.`);
    showProblem(problems.join(" "));
    await this.classify();
  }

  // Classify all images by the present policy, one by one, as their times are shown.
  async classify() {
    const round = ++this.round;
    this.showPolicy();
    await this.measureEveryExit();
    for (const [n, image] of this.images.entries()) {
      if (n % 20 === 19) await new Promise((resume) => setTimeout(resume)); // let the browser draw
      const began = performance.now();
      const { classes, confidence, exits } = await this.predictor.predict(image.pixels, this.policy.thresholds);
      image.milliseconds = performance.now() - began;
      if (round !== this.round) return;
      [image.class, image.confidence, image.exit] = [this.predictor.classNames[classes[0]], confidence[0], exits[0] + 1];
      this.showImage(image);
    }
    this.showTotals();
    document.body.dataset.round = round; // for tests: this classification is complete
  }

  showPolicy() {
    const { operations, val_acc1: accuracy } = this.policy;
    const share = operations / this.predictor.operations.at(-1);
    element("policy-operations").textContent = `${(operations / 1e6).toFixed(1)} M, ${percent(share)}`;
    element("policy-accuracy").textContent = `${accuracy.toFixed(1)} %`;
    const text = `${percent(share)} of the operations, ${accuracy.toFixed(1)} % of held-out images correct`;
    element("effort").setAttribute("aria-valuetext", text);
  }

  showImage(image) {
    const { card, confidence, exit, milliseconds } = image;
    if (!card.isConnected) element("results").append(card);
    card.style.setProperty("--exit", exitColour(exit, this.predictor.numExits));
    Object.assign(card.dataset, { name: image.name, class: image.class, confidence, exit });
    card.querySelector(".class").textContent = image.class.replaceAll("_", " ");
    card.querySelector(".exit").textContent = `exit ${exit}`;
    card.querySelector(".rest").textContent = `${percent(confidence)} sure, ${milliseconds.toFixed(1)} ms`;
    card.querySelector(".note").textContent = this.notes(image).join(" ");
  }

  // Return what is unusual about an image, in sentences.
  notes({ size, confidence }) {
    const { imageSize, numClasses } = this.predictor;
    const notes = [];
    if (Math.min(...size) > LARGE * imageSize) {
      notes.push(`Unlike the training images: ${size.join(" × ")} pixels, shrunk to ${imageSize} × ${imageSize}.`);
    } else if (Math.min(...size) < imageSize) {
      notes.push(`Smaller than the training images: ${size.join(" × ")} pixels, enlarged.`);
    }
    if (confidence < UNSURE) notes.push(`Unsure: perhaps none of the ${numClasses} classes.`);
    return notes;
  }

  showTotals() {
    const { operations, numExits } = this.predictor;
    const count = this.images.length;
    const left = Array.from({ length: numExits }, (_, k) => this.images.filter(({ exit }) => exit === k + 1).length);
    [...element("bars").children].forEach((bar, k) => {
      bar.querySelector(".bar span").style.width = `${(100 * left[k]) / Math.max(count, 1)}%`;
      bar.querySelector(".count").textContent = left[k];
    });
    const spent = left.reduce((sum, images, k) => sum + images * operations[k], 0);
    const milliseconds = this.images.reduce((sum, image) => sum + image.milliseconds, 0);
    const savedOperations = count ? percent(1 - spent / (count * operations.at(-1))) : "–";
    const savedTime = count ? percent(Math.max(0, 1 - milliseconds / (count * this.fullMilliseconds))) : "–";
    element("saved-operations").textContent = savedOperations;
    element("saved-time").textContent = savedTime;
    const parts = left.map((images, k) => `${images} at exit ${k + 1}`).filter((_, k) => left[k]);
    element("summary").textContent = count
      ? `${count} images: ${parts.join(", ")}. ${milliseconds.toFixed(0)} ms in all; every exit would take about ` +
        `${(count * this.fullMilliseconds).toFixed(0)} ms.`
      : "No images yet.";
  }
}

// Return an image as the network needs it, and its card for the page.
async function readImage(file, { imageSize, preprocessing }) {
  const picture = new Image();
  picture.src = URL.createObjectURL(file);
  await picture.decode();
  const size = [picture.naturalWidth, picture.naturalHeight];
  const card = document.createElement("li");
  card.innerHTML = '<div class="text"><div class="class"></div><div class="figures"><span class="exit"></span>, <span class="rest"></span></div><p class="note"></p></div>';
  picture.alt = file.name;
  picture.className = Math.max(...size) < 100 ? "small" : "";
  card.prepend(picture);
  return { name: file.name, pixels: toPixels(picture, imageSize, preprocessing), size, card };
}

// Return the central square of a picture as planes of red, green and blue: the shorter side is resized to imageSize / crop_share pixels,
// then the middle is cut out, as image_data does in Python.
function toPixels(picture, imageSize, { crop_share: share, interpolation }) {
  const [width, height] = [picture.naturalWidth, picture.naturalHeight];
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff"; // behind transparent pixels
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, 0, 0, width, height);
  const rgba = context.getImageData(0, 0, width, height).data;
  const shorter = roundHalfToEven(imageSize / share);
  const longer = Math.floor((shorter * Math.max(width, height)) / Math.min(width, height));
  const [newWidth, newHeight] = width <= height ? [shorter, longer] : [longer, shorter];
  const left = roundHalfToEven((newWidth - imageSize) / 2);
  const top = roundHalfToEven((newHeight - imageSize) / 2);
  const columns = resizeWeights(width, newWidth, interpolation).slice(left, left + imageSize);
  const rows = resizeWeights(height, newHeight, interpolation).slice(top, top + imageSize);
  const pixels = new Uint8Array(3 * imageSize * imageSize);
  for (let channel = 0; channel < 3; channel++) {
    const narrow = new Uint8ClampedArray(height * imageSize); // columns resized, rows not yet
    for (let y = 0; y < height; y++) {
      columns.forEach(({ first, weights }, x) => {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) sum += weights[i] * rgba[4 * (y * width + first + i) + channel];
        narrow[y * imageSize + x] = sum; // rounded and clamped
      });
    }
    const plane = new Uint8ClampedArray(pixels.buffer, channel * imageSize * imageSize, imageSize * imageSize);
    rows.forEach(({ first, weights }, y) => {
      for (let x = 0; x < imageSize; x++) {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) sum += weights[i] * narrow[(first + i) * imageSize + x];
        plane[y * imageSize + x] = sum;
      }
    });
  }
  return pixels;
}

const KERNELS = {
  bilinear: { reach: 1, at: (x) => Math.max(0, 1 - x) },
  bicubic: { reach: 2, at: (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0) },
};

// Return, for each of `to` pixels, which of `from` pixels it averages and with which weights, as Pillow's antialiased resize does.
function resizeWeights(from, to, interpolation) {
  const { reach, at } = KERNELS[interpolation];
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: to }, (_, n) => {
    const center = (n + 0.5) * scale;
    const first = Math.max(0, Math.floor(center - reach * stretch + 0.5));
    const end = Math.min(from, Math.floor(center + reach * stretch + 0.5));
    const weights = Array.from({ length: end - first }, (_, i) => at(Math.abs((first + i + 0.5 - center) / stretch)));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return { first, weights: weights.map((weight) => weight / total) };
  });
}

function roundHalfToEven(value) {
  const rounded = Math.round(value);
  return Math.abs(value % 1) === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

// From green at the first exit to red at the last.
function exitColour(exit, numExits) {
  const share = numExits > 1 ? Math.round((100 * (exit - 1)) / (numExits - 1)) : 0;
  return `color-mix(in oklch, var(--exit-5) ${share}%, var(--exit-1))`;
}

async function fetchBytes(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`There is no file ${decodeURI(url.pathname)}.`);
  return new Uint8Array(await response.arrayBuffer());
}

function showProblem(text) {
  element("problem").textContent = text;
  element("problem").hidden = !text;
}

async function open() {
  if (typeof WebAssembly !== "object") throw new Error("This browser has no WebAssembly, which the network needs.");
  const ort = await import(new URL("ort.wasm.bundle.min.mjs", RUNTIME)).catch(() => {
    throw new Error("ONNX Runtime is missing: type npm install in examples/browser.");
  });
  ort.env.wasm.wasmPaths = RUNTIME.href;
  ort.env.wasm.numThreads = 1; // several would need headers that a plain file server does not send
  const predictor = await Predictor.load(ort, (name) => fetchBytes(new URL(name, NETWORK)));
  if (!predictor.points.length) throw new Error("This network was exported without policies, which the slider needs.");
  const { interpolation } = predictor.preprocessing;
  if (!(interpolation in KERNELS)) throw new Error(`This page cannot resize images by ${interpolation} interpolation.`);
  const page = new Page(predictor);
  for (let run = 0; run < WARM_UP; run++) await page.measureEveryExit();
  await page.addPictures();
}

open().catch((error) => {
  showProblem(error.message);
  element("summary").textContent = "The network could not be loaded.";
});
