// Classify images with a network that export_onnx.py wrote (npm install onnxruntime-node):
//
//     node classify.js network.onnx 0.9,0.8,0.7 cat.ppm dog.ppm
//
// with one threshold an exit, and images as binary PPM (P6) of the network's size. All go through the network as one batch, which an
// image leaves at the first exit that is sure enough.
const fs = require("fs");
const ort = require("onnxruntime-node");

function readPixels(path, size) {
  const bytes = fs.readFileSync(path);
  const header = /^P6\s+(\d+)\s+(\d+)\s+255\s/.exec(bytes.toString("latin1", 0, 64));
  if (!header || +header[1] !== size || +header[2] !== size) throw new Error(`${path} is no PPM image of ${size} x ${size} pixels`);
  const rgb = bytes.subarray(header[0].length);
  return Uint8Array.from({ length: 3 * size * size }, (_, i) => rgb[3 * (i % (size * size)) + Math.floor(i / (size * size))]);
}

async function main(model, thresholds, ...files) {
  if (!files.length) throw new Error("usage: node classify.js MODEL.onnx THRESHOLD,THRESHOLD,... IMAGE.ppm ...");
  const session = await ort.InferenceSession.create(model);
  const size = session.inputMetadata.find((input) => input.name === "images").shape[2];
  const pixels = new Uint8Array(files.length * 3 * size * size);
  files.forEach((file, n) => pixels.set(readPixels(file, size), n * 3 * size * size));
  const values = Float32Array.from(thresholds.split(","), Number);
  const { classes, confidence, exits } = await session.run({
    images: new ort.Tensor("uint8", pixels, [files.length, 3, size, size]),
    thresholds: new ort.Tensor("float32", values, [values.length]),
  });
  files.forEach((file, n) => console.log(`${file}: class ${classes.data[n]}, ${confidence.data[n].toFixed(4)}, exit ${exits.data[n] + 1n}`));
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error.message);
  process.exit(1);
});
