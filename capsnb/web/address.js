// A widget's state in the address of the page, as `?explorer.capsule=7&explorer.pose=0.1,-0.2`: a view can be shared.

/** The state that the address names: `initial`, with what the address changes of it. */
export function stateOf(kind, initial, query = location.search) {
  const named = new URLSearchParams(query), state = { ...initial };
  for (const [name, value] of Object.entries(initial)) {
    const text = named.get(`${kind}.${name}`);
    if (text !== null) state[name] = parse(text, value);
  }
  return state;
}

/** Whether the address names anything of this widget. */
export const isNamed = (kind, query = location.search) =>
  [...new URLSearchParams(query).keys()].some((name) => name.startsWith(`${kind}.`));

function parse(text, like) {
  if (Array.isArray(like)) return text.split(",").map(Number);
  if (text === "none") return null;
  return typeof like === "string" ? text : Number(text);
}

const written = (value) =>
  Array.isArray(value) ? value.map((number) => +number.toFixed(3)).join() : typeof value === "number" ? +value.toFixed(3) : value;

/** Put the state into the address without a step in the history; other widgets' states stay. */
export function write(kind, state) {
  const url = new URL(location.href);
  for (const [name, value] of Object.entries(state)) url.searchParams.set(`${kind}.${name}`, written(value) ?? "none");
  history.replaceState(history.state, "", url.href.replaceAll("%2C", ","));
}
