// The figures, kept up to date while somebody can see them.

import { byId, element, setText } from "./dom.js";
import { refusal } from "./server.js";

const PACE = 2000; // ms between two looks
const SLOWEST = 30000; // after failures
const PATIENCE = 8000; // ms for an answer
const POINTS = 60; // of the line

export class Status {
  constructor(server, { onState, onLocked }) {
    this.server = server;
    this.onState = onState;
    this.onLocked = onLocked;
    this.locked = document.body.dataset.locked === "true"; // nothing but health is told now
    this.required = this.locked; // a key, to be told more
    this.delay = PACE;
    this.rates = [];
    this.timer = 0;
    this.looking = false;
    this.seen = new Date();
    document.addEventListener("visibilitychange", () => this.look());
  }

  /** Looks now, and again and again unless the tab is hidden. */
  async look() {
    clearTimeout(this.timer);
    if (document.hidden || this.looking) return;
    this.looking = true;
    try {
      // Without a key there is nothing to see but health, which needs none.
      await (this.locked && !this.server.key ? this.#health() : this.#state());
      this.delay = PACE;
    } catch {
      this.delay = Math.min(this.delay * 2, SLOWEST);
      this.#stale("The server doesn't answer.");
    }
    this.looking = false;
    clearTimeout(this.timer);
    if (!document.hidden) this.timer = setTimeout(() => this.look(), this.delay);
  }

  async #health() {
    const response = await this.server.fetch("readiness", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    const body = await response.json();
    this.#fresh();
    this.#ready(response.ok);
    setText(byId("sentence"), response.ok ? "Ready" : (body.message ?? "Not ready"));
  }

  async #state() {
    const response = await this.server.fetch("page/state", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (response.status === 401) {
      this.lock();
      this.onLocked();
      return;
    }
    if (!response.ok) {
      this.#stale(await refusal(response));
      this.delay = SLOWEST;
      return;
    }
    const state = await response.json();
    this.#fresh();
    this.required = this.server.key !== "" && this.required;
    this.#lock(false);
    this.#show(state);
    this.onState(state);
  }

  /** The key is refused, or forgotten. */
  lock() {
    this.required = true;
    this.#lock(true);
  }

  #show(state) {
    this.#ready(state.ready);
    setText(byId("sentence"), (state.ready && state.sentence) || state.health);
    for (const node of document.querySelectorAll("[data-text]")) setText(node, state.texts[node.dataset.text] ?? "–");
    setText(byId("digest"), `${state.texts.rate} tokens/s, ${state.texts.running} running`);
    const title = `${state.texts.model} – lightllmd`;
    if (document.title !== title) document.title = title;
    byId("used").setAttribute("width", (state.share * 100).toFixed(1));
    this.#line(state.rate);
    const workers = JSON.stringify(state.workers);
    if (workers !== this.workers) {
      this.workers = workers;
      byId("workers").replaceChildren(...state.workers.map(worker));
    }
  }

  #line(rate) {
    this.rates = [...this.rates, rate].slice(-POINTS);
    const most = Math.max(1, ...this.rates);
    const at = (value, index) => `${(((POINTS - this.rates.length + index) * 120) / (POINTS - 1)).toFixed(1)},${(26 - (value / most) * 24).toFixed(1)}`;
    byId("spark").firstElementChild.setAttribute("points", this.rates.map(at).join(" "));
  }

  #ready(ready) {
    byId("health").dataset.ready = ready;
    setText(byId("health-word"), ready ? "Ready" : "Not ready");
  }

  #lock(locked) {
    this.locked = locked;
    byId("locked").hidden = !locked;
    byId("figures").hidden = locked;
    byId("served").hidden = locked;
    if (locked) setText(byId("digest"), "");
  }

  #fresh() {
    this.seen = new Date();
    byId("stale").hidden = true;
  }

  #stale(why) {
    const node = byId("stale");
    setText(node, `${why} The figures are those of ${this.seen.toLocaleTimeString()}.`);
    node.hidden = false;
  }
}

function worker({ name, said, ready }) {
  const told = [element("span", { class: "name" }, name), " ", element("span", { class: "said" }, said)];
  return element("li", { "data-ready": ready }, ...told);
}
