// Run a network that export_onnx.py wrote, with onnxruntime-node or onnxruntime-web:
//
//     const predictor = await Predictor.load(ort, (name) => readFile(`network/${name}`));   // a file per block
//     const predictor = await Predictor.loadFile(ort, await readFile("network.onnx"));       // one file
//     const { classes, confidence, exits } = await predictor.predict(pixels, predictor.choose(20e6).thresholds);
//
// Pixels are a Uint8Array of N * 3 * S * S values: image by image, and of each image the red, green and blue plane.
// Exits count from 0, as in all arrays.

export const FORMAT = "imta-msdnet onnx 4";
const FIELDS = ["class_names", "fingerprint", "image_size", "operations", "points", "preprocessing", "weights"];

export class Predictor {
  // Load a file per block. `read(name)` returns a promise of the bytes of one file, as a Uint8Array.
  static async load(ort, read) {
    const content = parse(new TextDecoder().decode(await read("network.json")), "network.json");
    checkFields(content, "network.json", [...FIELDS, "blocks"]);
    const { blocks, fingerprint, operations } = content;
    if (blocks.length !== operations.length) {
      throw new Error(`network.json has ${operations.length} exits, but ${blocks.length} blocks`);
    }
    const loadBlock = async (block) => {
      const file = block?.file;
      if (typeof file !== "string" || !/^\w[\w.-]*$/.test(file)) {
        throw new Error("network.json is damaged: see its blocks");
      }
      const bytes = await read(file);
      const metadata = readMetadata(bytes, file);
      if (metadata.format !== FORMAT || metadata.fingerprint !== fingerprint) {
        throw new Error(`${file} is a block of another network or version than network.json`);
      }
      return createSession(ort, bytes, file);
    };
    return new Predictor(ort, content, await Promise.all(blocks.map(loadBlock)), true);
  }

  // Load one file from its bytes; messages call it `name`.
  static async loadFile(ort, bytes, name = "the ONNX file") {
    const content = readMetadata(bytes, name);
    checkFields(content, name, FIELDS);
    for (const field of FIELDS) {
      if (field !== "fingerprint") content[field] = parse(content[field], `${field} of ${name}`);
    }
    return new Predictor(ort, content, [await createSession(ort, bytes, name)], false);
  }

  constructor(ort, content, sessions, inBlocks) {
    this.ort = ort;
    this.sessions = sessions;
    this.inBlocks = inBlocks;
    this.classNames = content.class_names;
    this.imageSize = content.image_size;
    this.operations = content.operations; // to each exit, per image
    this.points = content.points; // the policies
    this.weights = content.weights; // of the logits of all exits, at each exit
    this.preprocessing = content.preprocessing; // crop_share and interpolation of the resize; mean and std, which the network applies
    this.fingerprint = content.fingerprint; // of the network, for files that belong to it
    this.numExits = this.operations.length;
    this.numClasses = this.classNames.length;
  }

  // Return the policy that is most accurate on held-out images and needs at most so many operations per image on average.
  choose(operations) {
    if (!this.points.length) throw new Error("this network was exported without policies: pass thresholds");
    if (typeof operations !== "number" || Number.isNaN(operations)) {
      throw new Error(`the operations per image are ${operations}, which is not a number`);
    }
    const allowed = this.points.filter((point) => point.operations <= operations);
    if (!allowed.length) {
      const minimum = Math.min(...this.points.map((point) => point.operations));
      throw new Error(`no policy needs at most ${operations} operations per image: the cheapest needs ${minimum}`);
    }
    return allowed.reduce((best, point) =>
      point.val_acc1 > best.val_acc1 || (point.val_acc1 === best.val_acc1 && point.operations < best.operations) ? point : best,
    );
  }

  // Classify images; each leaves at the first exit whose largest probability reaches its threshold.
  async predict(pixels, thresholds) {
    const size = 3 * this.imageSize ** 2;
    if (!(pixels instanceof Uint8Array) || pixels.length % size) {
      const given = `${pixels?.constructor?.name} of ${pixels?.length} values`;
      throw new Error(`images are ${given}; this network needs a Uint8Array of N * 3 * ${this.imageSize} * ${this.imageSize}`);
    }
    this.#checkThresholds(thresholds);
    const count = pixels.length / size;
    const images = new this.ort.Tensor("uint8", pixels, [count, 3, this.imageSize, this.imageSize]);
    const limits = Float32Array.from(thresholds);
    const prediction = await (this.inBlocks ? this.#predictInBlocks(images, limits) : this.#predictInFile(images, limits));
    const wrong = prediction.confidence.findIndex((value) => !Number.isFinite(value));
    if (wrong >= 0) throw new Error(`the network's output is not finite for the image at position ${wrong}, from 0`);
    return prediction;
  }

  async #predictInFile(images, thresholds) {
    const feeds = { images, thresholds: new this.ort.Tensor("float32", thresholds, [this.numExits]) };
    const { classes, confidence, exits, logits } = await this.sessions[0].run(feeds);
    return {
      classes: Array.from(classes.data, Number),
      confidence: confidence.data,
      exits: Array.from(exits.data, Number),
      logits: logits.data,
    };
  }

  #checkThresholds(thresholds) {
    if (thresholds?.length !== this.numExits) {
      throw new Error(`there are ${thresholds?.length ?? "no"} thresholds; this network has ${this.numExits} exits`);
    }
    if (!Array.from(thresholds).every((threshold) => typeof threshold === "number" && !Number.isNaN(threshold))) {
      throw new Error(`thresholds are ${Array.from(thresholds, String).join(", ")}; not all of them are numbers`);
    }
  }

  // Run one block after another, each for the images that are still here.
  async #predictInBlocks(images, thresholds) {
    const count = images.dims[0];
    const width = this.numClasses;
    const logits = new Float32Array(count * width);
    const classes = new Array(count);
    const confidence = new Float32Array(count);
    const exits = new Array(count).fill(0);
    const seen = Array.from({ length: count }, () => []); // logits of every exit so far, per image
    let here = Array.from({ length: count }, (_, n) => n); // indices of the images that stay
    let state = { images };
    for (let k = 0; k < this.numExits && here.length; k++) {
      const session = this.sessions[k];
      const outputs = await session.run(Object.fromEntries(session.inputNames.map((name) => [name, state[name]])));
      const stay = []; // positions in this batch
      here.forEach((n, position) => {
        const own = outputs.logits.data.slice(position * width, (position + 1) * width);
        seen[n].push(own);
        exits[n] = k;
        // In the precision of the thresholds: a probability just below 1 is 1 there.
        if (!(Math.fround(Math.max(...softmax(own))) >= thresholds[k])) stay.push(position);
      });
      state = { previous_logits: this.#rows(outputs.logits, stay) };
      for (const [name, tensor] of Object.entries(outputs)) {
        if (name !== "logits") state[name.replace(/^next_/, "")] = this.#rows(tensor, stay);
      }
      here = stay.map((position) => here[position]);
    }
    for (let n = 0; n < count; n++) {
      const summed = logits.subarray(n * width, (n + 1) * width);
      seen[n].forEach((own, j) => {
        const weight = this.weights[exits[n]][j];
        if (weight !== 0) own.forEach((x, c) => (summed[c] += weight * x)); // 0 times infinity is not a number
      });
      const probs = softmax(summed);
      confidence[n] = Math.max(...probs);
      classes[n] = probs.indexOf(Math.max(...probs));
    }
    return { classes, confidence, exits, logits };
  }

  // Return these rows of a tensor.
  #rows(tensor, positions) {
    if (positions.length === tensor.dims[0]) return tensor;
    const width = tensor.size / tensor.dims[0];
    const data = new Float32Array(positions.length * width);
    positions.forEach((position, row) => data.set(tensor.data.subarray(position * width, (position + 1) * width), row * width));
    return new this.ort.Tensor("float32", data, [positions.length, ...tensor.dims.slice(1)]);
  }
}

// Threads that spin while they wait make every call many times slower when another program uses a core.
const SESSION_OPTIONS = { extra: { session: { intra_op: { allow_spinning: "0" } } } };

export function softmax(logits) {
  const largest = Math.max(...logits);
  const exponentials = Array.from(logits, (x) => Math.exp(x - largest));
  const total = exponentials.reduce((sum, x) => sum + x, 0);
  return exponentials.map((x) => x / total);
}

async function createSession(ort, bytes, name) {
  try {
    return await ort.InferenceSession.create(bytes, SESSION_OPTIONS);
  } catch (error) {
    throw new Error(`cannot load ${name}: ${oneLine(error)}`);
  }
}

function parse(text, name) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`cannot read ${name}: ${oneLine(error)}`);
  }
}

function oneLine(error) {
  return String(error.message ?? error).replace(/\s+/g, " ").slice(0, 200);
}

// Throw an error if an export has another format, or lacks one of these fields.
function checkFields(content, name, fields) {
  if (content?.format !== FORMAT) {
    throw new Error(`${name} was not written by this version of export_onnx.py: its format is "${content?.format}", not "${FORMAT}"`);
  }
  const missing = fields.filter((field) => content[field] == null);
  if (!missing.length) return;
  const isBlock = Object.keys(content).sort().join() === "fingerprint,format";
  const hint = isBlock ? "; it is one block of a network: pass its directory" : "";
  throw new Error(`${name} lacks ${missing.join(", ")}${hint}`);
}

// Return the metadata of an ONNX file, which ONNX Runtime does not show in JavaScript. The file is a protocol buffer: a list of
// fields, each a number and a value. Field 14 of the model holds the metadata, whose fields 1 and 2 are a name and a text.
function readMetadata(bytes, name) {
  const decode = (part) => new TextDecoder().decode(part);
  const metadata = {};
  try {
    for (const [field, value] of readFields(bytes)) {
      if (field !== 14) continue;
      const entry = Object.fromEntries(readFields(value));
      metadata[decode(entry[1])] = decode(entry[2]);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new Error(`${name} is damaged, or is no ONNX file`);
  }
  return metadata;
}

// Yield the number and the value of each field of a protocol buffer; throw a RangeError if it is damaged.
function* readFields(bytes) {
  let position = 0;
  const readNumber = () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      const byte = bytes[position++];
      if (byte === undefined) throw new RangeError("a number is cut off");
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  };
  while (position < bytes.length) {
    const key = readNumber();
    const type = key & 7;
    if (type !== 0 && type !== 2) throw new RangeError("a field has another type than those of ONNX");
    const value = readNumber(); // of type 2: the length of the bytes that follow
    if (type === 2) position += value;
    if (position > bytes.length) throw new RangeError("a field is cut off");
    yield [key >>> 3, type === 2 ? bytes.subarray(position - value, position) : value];
  }
}
