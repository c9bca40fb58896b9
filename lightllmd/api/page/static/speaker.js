// What screen readers say of an answer that grows: whole sentences, at a pace that can be followed.

import { element } from "./dom.js";

const PACE = 1500; // ms between two announcements
const SENTENCE = /[.!?:;…。！？]["'”’)\]]*\s|\n/g;
const LONGEST = 400; // characters that wait for the end of a sentence
const KEPT = 4; // announcements in the document

export class Speaker {
  constructor(region) {
    this.region = region; // aria-live
    this.text = "";
    this.last = 0;
  }

  add(text) {
    this.text += text;
    if (performance.now() - this.last < PACE) return;
    let end = this.text.length > LONGEST ? this.text.length : 0;
    for (const match of this.text.matchAll(SENTENCE)) end = Math.max(end, match.index + match[0].length);
    if (end) this.#say(end);
  }

  /** The rest, and `word` behind it. */
  end(word) {
    this.text += ` ${word}`;
    this.#say(this.text.length);
  }

  #say(end) {
    const said = this.text.slice(0, end).replace(/[`*#]+/g, "").trim();
    this.text = this.text.slice(end);
    this.last = performance.now();
    if (!said) return;
    this.region.append(element("p", {}, said));
    while (this.region.childElementCount > KEPT) this.region.firstElementChild.remove();
  }
}
