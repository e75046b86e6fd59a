// The static page: finds the placeholders that notebook cells left and brings each to life with a model in the browser.
//
// A widget sees what it sees in a live notebook: a `model` with get, set, on, off and save_changes. Here the functions
// of compute.js stand behind it instead of Python, and the address of the page holds its state.
import * as address from "./address.js";
import * as compute from "./compute.js";
import { loadModel } from "./engine.js";
import { digitOf, EXPERTS, modelName, ROUNDS } from "./parts.js";
import { ranges } from "./poses.js";

const WEIGHTS = new URL("../weights/", import.meta.url);

/** The four methods that widgets use of a Jupyter widget's model. */
class LocalModel {
  #values;
  #events = new EventTarget();
  #save;

  constructor(values, save) {
    [this.#values, this.#save] = [values, save];
  }
  get(name) {
    return this.#values[name];
  }
  set(name, value) {
    this.#values[name] = value;
    this.#events.dispatchEvent(new Event(`change:${name}`));
  }
  on(event, listener) {
    this.#events.addEventListener(event, listener);
  }
  off(event, listener) {
    this.#events.removeEventListener(event, listener);
  }
  save_changes() {
    this.#save();
  }
}

const manifests = new Map(), engines = new Map(), encoders = new Map();

/** Ask once for each name, and again after a failure. */
function once(asked, name, ask) {
  if (!asked.has(name)) asked.set(name, ask(name).catch((error) => (asked.delete(name), Promise.reject(error))));
  return asked.get(name);
}

const manifestOf = (name) =>
  once(manifests, name, async () => {
    const answer = await fetch(new URL(`${name}.json`, WEIGHTS)).catch(() => null);
    if (!answer?.ok) throw new Error(`The description of the ${name} model could not be fetched.`);
    return answer.json();
  });

/** The model as soon as the capsules `first` are there; its `whole` is the promise of the others. */
const engineOf = (manifest, first, onProgress) =>
  once(engines, manifest.name, (name) => loadModel(WEIGHTS, name, { onProgress, first, manifest }));

const encoderOf = (engine, onProgress) => once(encoders, engine.manifest.name, () => engine.loadEncoder({ onProgress }));

/** One widget on the page: its placeholder, its model, and the work behind it. */
class Session {
  #turn = 0;
  #steps = null;
  #frame = 0;
  #shown = {};

  constructor(placeholder) {
    const { widget, state, shown } = placeholder.dataset;
    Object.assign(this, { placeholder, kind: widget, work: compute[widget], initial: JSON.parse(state), printed: unpack(shown) });
    [this.still, this.note] = [".capsnb-still", ".capsnb-note"].map((part) => placeholder.querySelector(part));
    this.live = placeholder.appendChild(Object.assign(document.createElement("div"), { className: "capsnb-live" }));
  }

  /** Put the widget in the place of the still picture, then load the model that moves it. */
  async open() {
    const asked = address.stateOf(this.kind, this.initial);
    const named = address.isNamed(this.kind) && (await this.#fits(asked));
    const state = named ? asked : this.initial, manifest = await manifestOf(modelName(state));
    const { render } = await import(`./${this.kind}.js`);
    const values = { state, manifest, shown: named ? {} : this.printed, faces: null };
    this.model = new LocalModel(values, () => this.#save());
    this.live.replaceChildren();
    this.stop = render({ model: this.model, el: this.live });
    [this.still.hidden, this.live.hidden] = [true, false];
    if (named) this.live.scrollIntoView({ block: "center" });
    await this.#engine(state, manifest);
    if (named || !this.work.encoder) await this.#show();
    this.placeholder.dataset.ready = "";
    await this.#showFaces(manifest.name);
  }

  async #showFaces(name) {
    const engine = await engines.get(name);
    await engine.whole;
    if (name === modelName(this.model.get("state"))) this.model.set("faces", compute.faces(engine));
  }

  /** Show the still picture again, and say why. */
  close(error) {
    this.stop?.(); // or what plays would go on behind the picture, and fail again in every frame
    delete this.placeholder.dataset.ready;
    [this.still.hidden, this.live.hidden] = [false, true];
    const again = Object.assign(document.createElement("button"), { type: "button", textContent: "Try again" });
    again.addEventListener("click", () => attempt(this, () => this.open()));
    console.error(error);
    const sentence = error.constructor === Error ? error.message : "Something went wrong in this widget.";
    this.say(`${sentence} So this is a still picture. `, again);
  }

  /** Say something under the widget: what is given, else what the reader should know of the address. */
  say(...content) {
    if (!content.length && this.notice) content.push(this.notice);
    this.note.replaceChildren(...content);
    this.note.hidden = !content.length;
  }

  /** Whether the state that the address names can be shown. */
  async #fits(state) {
    if (RULES.dataset(state.dataset, await manifestOf(modelName(this.initial)), state)) {
      const manifest = await manifestOf(modelName(state));
      if (Object.entries(state).every(([name, value]) => RULES[name](value, manifest, state))) return true;
    }
    this.notice = "The address asks for something that is not here, so this is the usual view.";
    return false;
  }

  /** Show the new state, then write it into the address: not before, or a failed one would be tried again and again. */
  #save() {
    const state = this.model.get("state");
    this.notice = "";
    clearTimeout(this.timer);
    attempt(this, async () => {
      await this.#show();
      if (state === this.model.get("state")) this.timer = setTimeout(() => address.write(this.kind, state), 300);
    });
  }

  /** Compute what the state asks for, as far as nothing newer is asked meanwhile. */
  async #show() {
    const turn = ++this.#turn, state = this.model.get("state");
    if (modelName(state) !== this.model.get("manifest").name) return this.#turnTo(modelName(state));
    const engine = await this.#engine(state, this.model.get("manifest"));
    if (this.work.encoder?.(state)) await encoderOf(engine, this.#progress("the encoder"));
    this.say();
    if (turn !== this.#turn) return;
    this.#steps = this.work(engine, this.model.get("state"), this.#shown);
    this.#frame ||= requestAnimationFrame((now) => this.#draw(now));
  }

  async #turnTo(name) {
    const manifest = await manifestOf(name);
    if (name !== modelName(this.model.get("state"))) return;
    this.model.set("faces", null);
    this.model.set("manifest", manifest);
    await this.#show();
    await this.#showFaces(name);
  }

  /** Work for most of a frame, draw what is there, go on in the next. */
  #draw(now) {
    this.#frame = 0;
    let done = false;
    do done = this.#steps.next().done;
    while (!done && performance.now() - now < 10);
    this.model.set("shown", { ...this.#shown });
    if (!done) this.#frame = requestAnimationFrame((next) => this.#draw(next));
  }

  /** The model, with the weights of all the capsules that the state needs. */
  async #engine(state, manifest) {
    const needed = this.work.capsules(state, manifest);
    const engine = await engineOf(manifest, needed, this.#progress("the decoder"));
    if (!needed.every((j) => engine.has(j))) await engine.whole;
    this.say();
    return engine;
  }

  /** A bar for what takes a while to arrive. */
  #progress(what) {
    const bar = document.createElement("progress"), text = document.createElement("span");
    return ({ loaded, total }) => {
      text.textContent = `Loading ${what}: ${(total / 1e6).toFixed(1)} MB `;
      Object.assign(bar, { value: loaded, max: total }).setAttribute("aria-label", `Loading ${what}`);
      if (!bar.isConnected) this.say(text, bar);
    };
  }
}

/** What a value of a state may be. */
const between = (low, high) => (value) => Number.isFinite(value) && value >= low && value <= high;
const count = (name) => (value, manifest) => Number.isInteger(value) && value >= 0 && value < manifest[name];
const digit = (value, manifest) => value === null || digitOf(manifest, value) !== undefined;
const RULES = {
  system: () => true, // it is named with the data set
  dataset: (value, { systems }, { system = EXPERTS }) => Object.hasOwn(systems, system) && systems[system].datasets.includes(value),
  capsule: count("capsules"),
  dimension: count("dim"),
  domain: (value, { poses }) => value === "complete" || (value === "restricted" && poses.bounded),
  start: (value) => ["real", "random", "mean"].includes(value),
  over: (value) => ["upper", "lower"].includes(value),
  pose: (value, manifest) => {
    const ends = ranges(manifest);
    return value.length === ends.length && value.every((number, k) => between(...ends[k])(number));
  },
  time: (value, { dim }) => between(0, dim)(value),
  share: between(0, 1),
  rounds: (value) => Number.isInteger(value) && between(1, ROUNDS)(value),
  ink: (value) => /^([\w-]{523})?$/.test(value),
  image: digit,
  from: digit,
  to: digit,
};

/** What the placeholder holds for the first picture: base64 as bytes, everything else as it is. */
function unpack(text) {
  const bytes = (value) => Uint8Array.from(atob(value), (letter) => letter.charCodeAt(0));
  return Object.fromEntries(Object.entries(JSON.parse(text)).map(([name, value]) => [name, bytes(value)]));
}

async function attempt(session, action) {
  try {
    await action();
  } catch (error) {
    session.close(error);
  }
}

for (const placeholder of document.querySelectorAll(".capsnb[data-widget]")) {
  const session = new Session(placeholder);
  attempt(session, () => session.open());
}
