// An answer as it grows: paragraphs, code blocks, code and bold words; everything else as it is written. Text nodes
// only. What has been drawn is left alone but for its last few hundred characters, however long it gets.

import { copyButton, element } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)/;
const HEADING = /^#{1,6} +(?=\S)/;
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*/g;
const REDRAWN = 1500; // characters of a paragraph, or of a line, that are drawn anew with each step
const LANGUAGE = 24; // characters shown

export class Answer {
  constructor(into) {
    this.text = "";
    this.into = into;
    this.line = ""; // that has not ended, or what is left of it
    this.begun = false; // whether some of that line is drawn for good
    this.code = null; // the open block: {fence, node, tail}
    this.paragraph = null; // the open one: {element, span, written}
    this.frame = 0;
    this.onDraw = () => {};
  }

  /** Drawn with the browser's next frame. */
  add(text) {
    this.text += text;
    const lines = (this.line + text).split("\n");
    this.line = lines.pop();
    for (const line of lines) this.#ended(line);
    this.line = this.#shortened(this.line);
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  /** Draws at once. */
  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const fence = !this.begun && FENCE.test(this.line);
    if (this.code) this.code.tail.data = fence ? "" : this.line;
    else if (!fence && (this.line || this.paragraph)) this.#write(this.line, false);
    this.onDraw();
  }

  /** Nothing comes any more. */
  end() {
    if (this.line || this.begun) this.#ended(this.line);
    this.line = "";
    this.draw();
    if (!this.code) this.#settle();
  }

  /** What is left of a line once as much as is too long to be drawn again is drawn for good. */
  #shortened(line) {
    while (line.length > REDRAWN) {
      const part = line.slice(0, REDRAWN);
      line = line.slice(REDRAWN);
      this.begun = true;
      if (this.code) this.code.node.appendData(part);
      else this.#write(part, true);
    }
    return line;
  }

  #ended(whole) {
    const line = this.#shortened(whole);
    const fence = this.begun ? null : FENCE.exec(line);
    const blank = !this.begun && !line.trim();
    this.begun = false;
    if (this.code) {
      const closes = fence && fence[1].startsWith(this.code.fence) && line.trim() === fence[1];
      if (closes) {
        this.code.tail.remove();
        this.code = null;
      } else {
        this.code.tail.data = "";
        this.code.node.appendData(line + "\n");
      }
    } else if (fence) {
      this.#settle();
      this.#open(fence[1], fence[2]);
    } else if (blank) {
      this.#settle();
    } else {
      this.#write(line + "\n", true);
    }
  }

  #open(fence, language) {
    const node = document.createTextNode("");
    const tail = document.createTextNode("");
    // A block that scrolls is reached by the keyboard.
    const name = language.slice(0, LANGUAGE) || "code";
    const reached = { tabindex: "0", role: "group", "aria-label": name };
    const code = element("pre", reached, element("code", {}, node, tail));
    const copy = copyButton("Copy code", () => node.data + tail.data);
    const head = element("div", { class: "head" }, element("span", {}, name), copy);
    this.into.append(element("div", { class: "block" }, head, code));
    this.code = { fence, node, tail };
  }

  /** `lasting`: the text stays; otherwise the next call replaces it. */
  #write(text, lasting) {
    if (!this.paragraph) {
      const span = element("span");
      this.paragraph = { span, element: element("p", {}, span), written: "" };
      this.into.append(this.paragraph.element);
    }
    const open = this.paragraph;
    const whole = open.written + text;
    // The last line break of a paragraph is not shown: the next paragraph begins on a line of its own.
    open.span.replaceChildren(...inline(whole.endsWith("\n") ? whole.slice(0, -1) : whole));
    if (!lasting) return;
    open.written = whole;
    if (whole.length >= REDRAWN) {
      open.span.replaceChildren(...inline(whole));
      open.span = element("span");
      open.element.append(open.span);
      open.written = "";
    }
  }

  /** The paragraph ends with what was written for good; what looked like more of it was the beginning of a block. */
  #settle() {
    const open = this.paragraph;
    this.paragraph = null;
    if (!open) return;
    const text = open.written.endsWith("\n") ? open.written.slice(0, -1) : open.written;
    open.span.replaceChildren(...inline(text));
    if (!open.element.textContent) open.element.remove();
  }
}

function inline(text) {
  const heading = HEADING.exec(text);
  if (heading) {
    const end = text.indexOf("\n");
    const first = text.slice(heading[0].length, end < 0 ? undefined : end);
    return [element("strong", {}, first), ...(end < 0 ? [] : inline(text.slice(end)))];
  }
  const made = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) made.push(text.slice(at, match.index));
    made.push(match[1] !== undefined ? element("code", {}, match[1]) : element("strong", {}, match[2]));
    at = match.index + match[0].length;
  }
  if (at < text.length) made.push(text.slice(at));
  return made;
}
