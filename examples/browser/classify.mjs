// Classify images in Node.js (npm install in this directory, for onnxruntime-node):
//
//     node classify.mjs MODEL OPERATIONS IMAGE.ppm ...
//     node classify.mjs network.onnx 20e6 cat.ppm dog.ppm
//     node classify.mjs network/ 0.9,0.8,0.7,0.6,0 cat.ppm dog.ppm
//
// MODEL is a file or directory of export_onnx.py; OPERATIONS a number of operations per image, or one threshold per exit. Images are
// binary PPM (P6) of the network's size; a file may hold several. They go through the network in batches, which each image leaves at the
// first exit that is sure enough.
import { readFile, stat } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { Predictor } from "./predictor.mjs";

const ort = createRequire(import.meta.url)("onnxruntime-node");
const BATCH_SIZE = 64;

// Return the images of a PPM file, as a Uint8Array of planes each.
function readImages(name, bytes, size) {
  const images = [];
  for (let position = 0; position < bytes.length; ) {
    const header = /^P6\s+(\d+)\s+(\d+)\s+255\s/.exec(bytes.toString("latin1", position, position + 64));
    if (!header || +header[1] !== size || +header[2] !== size) {
      throw new Error(`${name} is no PPM image of ${size} x ${size} pixels`);
    }
    const rgb = bytes.subarray(position + header[0].length, position + header[0].length + 3 * size * size);
    const area = size * size;
    images.push(Uint8Array.from({ length: 3 * area }, (_, i) => rgb[3 * (i % area) + Math.floor(i / area)]));
    position += header[0].length + rgb.length;
  }
  return images;
}

async function main(model, limit, ...files) {
  if (!files.length) throw new Error("usage: node classify.mjs MODEL OPERATIONS IMAGE.ppm ...");
  const isDirectory = (await stat(model)).isDirectory();
  const predictor = isDirectory
    ? await Predictor.load(ort, (name) => readFile(join(model, name)))
    : await Predictor.loadFile(ort, await readFile(model));
  const thresholds = limit.includes(",") ? limit.split(",").map(Number) : predictor.choose(Number(limit)).thresholds;
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
  console.error(error.code === "ENOENT" ? `there is no file ${error.path}` : error.message);
  process.exitCode = 1;
});
