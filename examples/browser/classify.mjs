// Classify images in Node.js (npm install in this directory, for onnxruntime-node):
//
//     node classify.mjs MODEL OPERATIONS IMAGE.ppm ...
//     node classify.mjs network.onnx 20e6 cat.ppm dog.ppm
//     node classify.mjs network/ 0.9,0.8,0.7,0.6,0 cat.ppm dog.ppm
//
// MODEL is a file or directory of export_onnx.py; OPERATIONS a number of operations per image, or one threshold per exit. Images are
// binary PPM (P6) of the network's size; a file may hold several. They go through the network in batches, which each image leaves at the
// first exit that is confident enough.
import { readFile as readBytes, stat } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { Predictor } from "./predictor.mjs";

const BATCH_SIZE = 64;

// The header of a PPM image: size and largest value, between blanks and comments.
const GAP = String.raw`(?:[ \t\r\n]|#[^\n]*\n)+`;
const HEADER = new RegExp(String.raw`^P6${GAP}(\d+)${GAP}(\d+)${GAP}(\d+)[ \t\r\n]`);
const MAX_HEADER = 4096; // bytes
const BLANKS = new TextEncoder().encode(" \t\r\n");

async function readFile(path) {
  return readBytes(path).catch((error) => {
    throw new Error(error.code === "ENOENT" ? `there is no file ${path}` : `cannot read ${path}: ${error.message}`);
  });
}

// Return the images of a PPM file, as a Uint8Array of planes each.
function readImages(name, bytes, size) {
  const images = [];
  const area = size * size;
  let rest = bytes;
  do {
    const image = images.length ? `image ${images.length + 1} of ${name}` : name;
    const header = HEADER.exec(rest.toString("latin1", 0, MAX_HEADER));
    if (!header) throw new Error(`${image} is no binary PPM image (P6)`);
    const [width, height, largest] = header.slice(1).map(Number);
    if (width !== size || height !== size) {
      throw new Error(`${image} has ${width} x ${height} pixels; this network needs ${size} x ${size}`);
    }
    if (largest !== 255) throw new Error(`${image} has values up to ${largest}; this network needs values up to 255`);
    const rgb = rest.subarray(header[0].length, header[0].length + 3 * area);
    if (rgb.length < 3 * area) throw new Error(`${image} is cut off: it has ${rgb.length} of ${3 * area} bytes`);
    images.push(Uint8Array.from({ length: 3 * area }, (_, i) => rgb[3 * (i % area) + Math.floor(i / area)]));
    let end = header[0].length + rgb.length;
    while (BLANKS.includes(rest[end])) end++; // a newline at the end of the file, say
    rest = rest.subarray(end);
  } while (rest.length);
  return images;
}

// Return the thresholds that the second argument holds, or those of the policy for so many operations.
function readThresholds(text, predictor) {
  const numbers = text.split(",").map((part) => (part.trim() ? Number(part) : NaN));
  if (numbers.some(Number.isNaN)) {
    throw new Error(`"${text}" is neither a number of operations per image nor one threshold per exit, as in 0.9,0.8,0`);
  }
  // One number below 2 is the threshold of a single exit: no network has so few operations.
  return numbers.length > 1 || numbers[0] < 2 ? numbers : predictor.choose(numbers[0]).thresholds;
}

function findRuntime() {
  try {
    return createRequire(import.meta.url)("onnxruntime-node");
  } catch (error) {
    if (error.code !== "MODULE_NOT_FOUND") throw error;
    throw new Error("onnxruntime-node is missing: type npm install in examples/browser");
  }
}

async function main(model, limit, ...files) {
  if (!files.length) throw new Error("usage: node classify.mjs MODEL OPERATIONS IMAGE.ppm ...");
  const ort = findRuntime();
  const isDirectory = await stat(model).then((found) => found.isDirectory(), () => false);
  const predictor = isDirectory
    ? await Predictor.load(ort, (name) => readFile(join(model, name)))
    : await Predictor.loadFile(ort, await readFile(model), model);
  const thresholds = readThresholds(limit, predictor);
  const images = [];
  for (const file of files) {
    for (const pixels of readImages(file, await readFile(file), predictor.imageSize)) images.push({ file, pixels });
  }
  for (let first = 0; first < images.length; first += BATCH_SIZE) {
    const batch = images.slice(first, first + BATCH_SIZE);
    const pixels = new Uint8Array(batch.length * batch[0].pixels.length);
    batch.forEach((image, n) => pixels.set(image.pixels, n * image.pixels.length));
    const { classes, confidence, exits } = await predictor.predict(pixels, thresholds);
    const lines = batch.map(
      ({ file }, n) => `${file}: ${predictor.classNames[classes[n]]}, ${confidence[n].toFixed(4)}, exit ${exits[n] + 1}\n`,
    );
    process.stdout.write(lines.join(""));
  }
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
