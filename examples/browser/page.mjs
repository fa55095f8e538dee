// The page: reads images, runs the network for each, and shows where it left. Exits are numbered from 1 here.
import { Predictor } from "./predictor.mjs";

const RUNTIME = new URL("node_modules/onnxruntime-web/dist/", import.meta.url);
const NETWORK = new URL("network/", import.meta.url);
const PICTURES = [
  ...["apple", "orange", "sunflower", "sea", "mountain", "skyscraper", "cup", "road"],
  ...["traffic_light", "clock", "bottle", "pear", "cloud", "plain", "plate"],
];
const MEASURED = 9; // newest times of every exit of which the fastest counts: other programs slow down the rest
const MEASURE_AGAIN = 250; // milliseconds until the time of every exit is measured again
const DRAW_AFTER = 40; // milliseconds of predictions until the browser draws and listens again
const LARGE = 4; // images with more than this many times the pixels per side are called unlike the training images
const SMALL = 64; // pixels per side: networks of larger images were trained on photographs of any size
const MAX_RATIO = 200; // of the sides of an image, as in Python
const UNSURE = 0.5; // below this probability, the image may show none of the classes
const MAX_IMAGES = 500;
const MAX_SIDE = 1024; // the browser shrinks larger images to so many pixels on the shorter side, before they are resized as in Python
const NAMED = 5; // so many unreadable files are named

const element = (id) => document.getElementById(id);
const percent = (share) => `${Math.round(100 * share)}\u00a0%`;
const nextTask = () => new Promise((resume) => setTimeout(resume));

class Page {
  constructor(predictor) {
    this.predictor = predictor;
    this.policies = [...predictor.points].sort((a, b) => a.operations - b.operations);
    this.images = []; // { name, pixels, size: [width, height], card, policy, ... } and the prediction by this policy
    this.times = Array.from({ length: predictor.numExits }, () => []); // newest milliseconds of images that left at each exit
    this.measured = -Infinity; // when every exit was last measured
    this.underWay = 0; // calls of add() and classify() that have not ended
    this.classifying = false;
    this.unreadable = []; // names of files
    this.showNetwork();
    this.listen();
  }

  get policy() {
    return this.policies[Number(element("effort").value)];
  }

  // Classify one image, and keep its time.
  async predict(pixels, thresholds) {
    const began = performance.now();
    const { classes, confidence, exits } = await this.predictor.predict(pixels, thresholds);
    const milliseconds = performance.now() - began;
    this.times[exits[0]] = [...this.times[exits[0]], milliseconds].slice(-MEASURED);
    return { class: this.predictor.classNames[classes[0]], confidence: confidence[0], exit: exits[0] + 1, milliseconds };
  }

  // Run one image through every exit, for the time that early exit is compared with.
  async measureEveryExit() {
    const { imageSize, numExits } = this.predictor;
    await this.predict(new Uint8Array(3 * imageSize ** 2), new Array(numExits).fill(2));
    this.measured = performance.now();
  }

  showNetwork() {
    const { classNames, imageSize, numExits } = this.predictor;
    element("network").textContent =
      `A network of ${numExits} exits and ${classNames.length} classes, trained on images of ${imageSize} × ${imageSize} pixels, ` +
      "runs in this page. An image leaves at the first exit that is confident enough; later blocks then cost nothing.";
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
      element("results").replaceChildren();
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
    const { images } = this;
    const shown = new Set(images.map(({ name }) => name));
    this.begin();
    try {
      await this.add(await Promise.all(PICTURES.filter((name) => !shown.has(name)).map(read)), images);
    } catch (error) {
      showProblem(error.message);
    }
    this.end();
  }

  // Read these files one by one, add them to the images and classify each. After "Remove all", which makes another list, stop.
  async add(files, images = this.images) {
    this.begin();
    for (const [n, file] of files.entries()) {
      if (images !== this.images) break;
      if (images.length >= MAX_IMAGES) {
        showProblem(`The page shows at most ${MAX_IMAGES} images.`);
        break;
      }
      element("summary").textContent = `Reading image ${n + 1} of ${files.length} …`;
      const image = await readImage(file, this.predictor).catch(() => null);
      if (image && images === this.images) {
        images.push(image);
        element("results").append(image.card);
        await this.classify();
      } else if (!image) {
        this.unreadable.push(file.name);
      }
    }
    this.end();
  }

  // Classify every image that the present policy has not classified yet, one by one, as their times are shown. There is one such loop at
  // a time, which also takes up the images and the policy that come meanwhile: a second one would be part of the times of the first.
  async classify() {
    this.showPolicy();
    if (this.classifying) return;
    this.classifying = true;
    this.begin();
    try {
      let drawn = performance.now();
      for (let image; (image = this.images.find(({ policy }) => policy !== this.policy)); ) {
        const { policy } = this;
        Object.assign(image, { policy, exit: null }); // an image that fails is not tried again
        try {
          Object.assign(image, await this.predict(image.pixels, policy.thresholds));
          this.showImage(image);
        } catch (error) {
          this.showFailure(image);
          showProblem(`${image.name}: ${error.message}`);
        }
        if (performance.now() - drawn < DRAW_AFTER) continue;
        this.showTotals();
        await nextTask();
        drawn = performance.now();
      }
      if (performance.now() - this.measured > MEASURE_AGAIN) await this.measureEveryExit();
    } catch (error) {
      showProblem(error.message);
    }
    this.classifying = false;
    this.end();
  }

  // Show the example pictures. Browsers compile WebAssembly while it runs: the times of the first predictions are measured again.
  async start() {
    this.begin();
    await this.addPictures();
    for (const times of this.times) times.length = 0;
    for (let run = 0; run < MEASURED; run++) await this.measureEveryExit();
    for (const image of this.images) image.policy = null;
    await this.classify();
    this.end();
  }

  // Note that work begins. While there is any, screen readers wait with what changes.
  begin() {
    if (!this.underWay) {
      showProblem("");
      for (const id of ["results", "summary"]) element(id).ariaBusy = "true";
    }
    this.underWay++;
  }

  // Note that work has ended; after the last, show the totals and which files could not be read.
  end() {
    this.underWay--;
    this.showTotals();
    if (this.underWay) return;
    if (this.unreadable.length) showProblem(`These files cannot be used as images: ${list(this.unreadable)}.`);
    this.unreadable = [];
    this.showSummary();
    for (const id of ["results", "summary"]) element(id).ariaBusy = "false";
    document.body.dataset.round = Number(document.body.dataset.round ?? 0) + 1; // for tests: everything is done
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
    card.style.setProperty("--exit", exitColour(exit, this.predictor.numExits));
    Object.assign(card.dataset, { name: image.name, class: image.class, confidence, exit });
    card.querySelector(".class").textContent = image.class.replaceAll("_", " ");
    card.querySelector(".exit").textContent = `exit ${exit}`;
    card.querySelector(".rest").textContent = `${percent(confidence)}\u00a0sure, ${milliseconds.toFixed(1)}\u00a0ms`;
    card.querySelector(".note").textContent = this.notes(image).join(" ");
  }

  showFailure({ name, card }) {
    for (const field of ["class", "confidence", "exit"]) delete card.dataset[field];
    card.style.removeProperty("--exit");
    for (const part of [".exit", ".rest", ".note"]) card.querySelector(part).textContent = "";
    card.querySelector(".class").textContent = "no prediction";
    card.dataset.name = name;
  }

  // Return what is unusual about an image, in sentences.
  notes({ size, confidence }) {
    const { imageSize, numClasses } = this.predictor;
    const notes = [];
    if (imageSize <= SMALL && Math.min(...size) > LARGE * imageSize) {
      notes.push(`Unlike the training images: ${size.join(" × ")} pixels, shrunk to ${imageSize} × ${imageSize}.`);
    } else if (Math.min(...size) < imageSize) {
      notes.push(`Smaller than the network's images: ${size.join(" × ")} pixels, enlarged.`);
    }
    if (confidence < UNSURE) notes.push(`Unsure: perhaps none of the ${numClasses} classes.`);
    return notes;
  }

  // Return the images that have been classified, how many left at each exit, and their milliseconds by the fastest time to each exit.
  get totals() {
    const classified = this.images.filter(({ exit }) => exit);
    const left = this.times.map((_, k) => classified.filter(({ exit }) => exit === k + 1).length);
    const milliseconds = left.reduce((sum, count, k) => sum + (count && count * Math.min(...this.times[k])), 0);
    return { count: classified.length, left, milliseconds, fullMilliseconds: classified.length * Math.min(...this.times.at(-1)) };
  }

  showTotals() {
    const { operations } = this.predictor;
    const { count, left, milliseconds, fullMilliseconds } = this.totals;
    [...element("bars").children].forEach((bar, k) => {
      bar.querySelector(".bar span").style.width = `${(100 * left[k]) / Math.max(count, 1)}%`;
      bar.querySelector(".count").textContent = left[k];
    });
    const spent = left.reduce((sum, images, k) => sum + images * operations[k], 0);
    element("saved-operations").textContent = count ? percent(1 - spent / (count * operations.at(-1))) : "–";
    const measured = count && Number.isFinite(milliseconds + fullMilliseconds); // every exit has a time
    element("saved-time").textContent = measured ? percent(1 - milliseconds / fullMilliseconds) : "–";
  }

  showSummary() {
    const { count, left, milliseconds, fullMilliseconds } = this.totals;
    const parts = left.map((images, k) => `${images} at exit ${k + 1}`).filter((_, k) => left[k]);
    element("summary").textContent = count
      ? `${count} ${count > 1 ? "images" : "image"}: ${parts.join(", ")}. About ${milliseconds.toFixed(0)} ms in all; ` +
        `through every exit, about ${fullMilliseconds.toFixed(0)} ms.`
      : "No images yet.";
  }
}

function list(names) {
  const more = names.length - NAMED;
  return more > 0 ? `${names.slice(0, NAMED).join(", ")} and ${more} more` : names.join(", ");
}

// Return an image as the network needs it, and its card for the page.
async function readImage(file, { imageSize, preprocessing }) {
  const picture = new Image();
  picture.src = URL.createObjectURL(file);
  await picture.decode().finally(() => URL.revokeObjectURL(picture.src));
  const size = [picture.naturalWidth, picture.naturalHeight];
  if (Math.max(...size) > MAX_RATIO * Math.min(...size)) throw new Error(`${file.name} is too thin.`);
  const card = document.createElement("li");
  card.innerHTML = '<div class="text"><div class="class"></div><div class="exit"></div><div class="rest"></div><p class="note"></p></div>';
  picture.alt = file.name;
  picture.className = Math.max(...size) < 100 ? "small" : "";
  card.prepend(picture);
  return { name: file.name, pixels: toPixels(picture, imageSize, preprocessing), size, card };
}

// Return the central square of a picture as planes of red, green and blue: the shorter side is resized to imageSize / crop_share pixels,
// then the middle is cut out, as image_data does in Python. Only the part that counts is drawn, and large pictures are drawn smaller:
// browsers limit the pixels of a canvas. Unlike Python, browsers convert colours of an embedded profile to sRGB, and do not stretch
// 16-bit gray.
function toPixels(picture, imageSize, { crop_share: share, interpolation }) {
  const sides = [picture.naturalWidth, picture.naturalHeight];
  const shrink = Math.min(1, MAX_SIDE / Math.min(...sides));
  const shorter = roundHalfToEven(imageSize / share);
  const [columns, rows] = sides.map((side) => {
    const resized = Math.floor((shorter * side) / Math.min(...sides));
    const first = roundHalfToEven((resized - imageSize) / 2);
    return resizeWeights(Math.round(side * shrink), resized, interpolation).slice(first, first + imageSize);
  });
  const [left, top] = [columns[0].first, rows[0].first];
  const [width, height] = [columns, rows].map((pixels) => pixels.at(-1).first + pixels.at(-1).weights.length - pixels[0].first);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff"; // behind transparent pixels
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, -left, -top, ...sides.map((side) => Math.round(side * shrink)));
  const rgba = context.getImageData(0, 0, width, height).data;
  const pixels = new Uint8Array(3 * imageSize * imageSize);
  for (let channel = 0; channel < 3; channel++) {
    const narrow = new Uint8ClampedArray(height * imageSize); // columns resized, rows not yet
    for (let y = 0; y < height; y++) {
      columns.forEach(({ first, weights }, x) => {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) sum += weights[i] * rgba[4 * (y * width + first - left + i) + channel];
        narrow[y * imageSize + x] = sum; // rounded and clamped
      });
    }
    const plane = new Uint8ClampedArray(pixels.buffer, channel * imageSize * imageSize, imageSize * imageSize);
    rows.forEach(({ first, weights }, y) => {
      for (let x = 0; x < imageSize; x++) {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) sum += weights[i] * narrow[(first - top + i) * imageSize + x];
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
  const response = await fetch(url).catch(() => {
    throw new Error(`The server does not send ${decodeURI(url.pathname)}: is it still running?`);
  });
  if (!response.ok) throw new Error(`There is no file ${decodeURI(url.pathname)}.`);
  return new Uint8Array(await response.arrayBuffer());
}

async function readNetwork(name) {
  return fetchBytes(new URL(name, NETWORK)).catch((error) => {
    throw new Error(`${error.message} export_onnx.py --output examples/browser/network/ writes it.`);
  });
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
  const predictor = await Predictor.load(ort, readNetwork);
  if (!predictor.points.length) throw new Error("This network was exported without policies, which the slider needs.");
  const { interpolation } = predictor.preprocessing;
  if (!(interpolation in KERNELS)) throw new Error(`This page cannot resize images by ${interpolation} interpolation.`);
  await new Page(predictor).start();
}

open().catch((error) => {
  showProblem(error.message);
  element("summary").textContent = "The network could not be loaded.";
});
