// The conversation: one answer at a time, streamed by the server's OpenAI routes.

import { Answer } from "./answer.js";
import { byId, copyButton, element, setText } from "./dom.js";
import { events } from "./events.js";
import { Follower } from "./follow.js";
import { refusal, sentence, told } from "./server.js";
import { Speaker } from "./speaker.js";

const WAITS = {
  waiting: "Waiting for the answer",
  held: "Waiting for the engine; the answer goes on when it is back",
};

export class Chat {
  /** `parameters()`: of the next request, and `system`; null: they are not valid. `onKey`: the server wants another. */
  constructor(server, { parameters, onKey }) {
    this.server = server;
    this.parameters = parameters;
    this.onKey = onKey;
    this.kind = "chat";
    this.messages = []; // that the next question follows
    this.running = null; // the answer on its way: {controller, stopped}
    this.ready = true; // the server's health
    this.follower = new Follower();
  }

  get busy() {
    return this.running !== null;
  }

  /** The server keeps nothing of the answer: its slots are free at once. */
  stop() {
    if (!this.running) return;
    this.running.stopped = true;
    this.running.controller.abort();
  }

  /** Forgets the conversation. */
  clear() {
    if (this.running) this.running.forgotten = true;
    this.stop();
    this.messages = [];
    byId("log").replaceChildren();
    byId("spoken").replaceChildren();
    setText(byId("trouble"), "");
    byId("welcome").hidden = false;
  }

  /** The server's health, as the status has it. */
  heed(ready) {
    this.ready = ready;
    if (this.running && !ready) this.running.turn.wait(WAITS.held);
  }

  /** Returns whether something was answered; false: the question is the user's again. */
  async ask(question) {
    const given = this.parameters();
    if (!given || this.running) return false;
    const turn = new Turn(question, new Speaker(byId("spoken")), this.follower);
    const running = (this.running = { controller: new AbortController(), stopped: false, forgotten: false, turn });
    byId("welcome").hidden = true;
    setText(byId("trouble"), "");
    byId("log").append(turn.asked, turn.shown);
    this.follower.toEnd();
    this.#buttons();
    turn.wait(this.ready ? WAITS.waiting : WAITS.held);
    const trouble = await this.#answer(running, question, given);
    this.running = null;
    this.#buttons();
    if (running.forgotten) return true;
    if (turn.empty) {
      turn.remove();
      setText(byId("trouble"), trouble || (running.stopped ? "Stopped before the answer began." : "The answer is empty."));
      byId("welcome").hidden = byId("log").childElementCount > 0;
      return false;
    }
    turn.end(trouble, running.stopped);
    this.messages.push({ role: "user", content: question }, { role: "assistant", content: turn.answer.text });
    return true;
  }

  /** Returns what went wrong, in a sentence, or nothing. */
  async #answer(running, question, given) {
    const { turn, controller } = running;
    const { system, ...parameters } = given;
    const body = { ...parameters, stream: true, stream_options: { include_usage: true } };
    const text = this.kind === "text";
    if (text) body.prompt = question;
    else {
      const before = system ? [{ role: "system", content: system }, ...this.messages] : this.messages;
      body.messages = [...before, { role: "user", content: question }];
    }
    try {
      const response = await this.server.fetch(text ? "v1/completions" : "v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: controller.signal,
      });
      if (response.status === 401) this.onKey();
      if (!response.ok) return await refusal(response);
      for await (const { data, comment } of events(response.body)) {
        if (comment !== undefined) {
          turn.wait(WAITS[comment] ?? WAITS.waiting);
          continue;
        }
        if (data === "[DONE]") return "";
        const chunk = JSON.parse(data);
        if (chunk.error) return sentence(told(chunk) || "the server broke the answer off");
        turn.take(chunk);
      }
      return running.stopped ? "" : "The connection broke off before the answer's end.";
    } catch (failure) {
      if (running.stopped) return "";
      if (failure instanceof SyntaxError) return "The server sent something that is not an answer.";
      return turn.empty ? "The server can't be reached." : "The connection broke off before the answer's end.";
    }
  }

  #buttons() {
    const [send, stop] = [byId("send"), byId("stop")];
    const inside = document.activeElement === stop;
    send.hidden = this.busy;
    stop.hidden = !this.busy;
    byId("log").setAttribute("aria-busy", this.busy);
    if (inside) byId("question").focus();
  }
}

class Turn {
  constructor(question, speaker, follower) {
    this.speaker = speaker;
    this.follower = follower;
    this.asked = element("li", { class: "asked" }, off("You asked:"), element("div", { class: "said", dir: "auto" }, question));
    this.body = element("div", { class: "answer", dir: "auto" });
    this.waiting = element("p", { class: "waiting" });
    this.shown = element("li", { class: "answered" }, off("Answer:"), this.body, this.waiting);
    this.answer = new Answer(this.body);
    this.answer.onDraw = () => follower.follow();
    this.began = performance.now();
    this.first = this.last = 0;
    this.finish = null;
    this.usage = null;
    this.thinking = null;
  }

  get empty() {
    return !this.answer.text && !this.thinking;
  }

  /** Shown until the next text. */
  wait(why) {
    setText(this.waiting, why);
    this.waiting.hidden = false;
  }

  take(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const delta = choice.delta ?? { content: choice.text };
    this.finish = choice.finish_reason ?? this.finish;
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (!thought && !delta.content) return;
    this.last = performance.now();
    this.first ||= this.last;
    this.waiting.hidden = true;
    if (thought) this.#think(thought);
    if (delta.content) {
      this.#thought();
      this.answer.add(delta.content);
      this.speaker.add(delta.content);
    }
  }

  #think(text) {
    if (!this.thinking) {
      const summary = element("summary", {}, "Thinking…");
      const node = document.createTextNode("");
      const details = element("details", { class: "thinking" }, summary, element("div", { dir: "auto" }, node));
      this.thinking = { summary, node, since: this.last, over: false };
      this.body.before(details);
    }
    this.thinking.node.appendData(text);
  }

  #thought() {
    const thinking = this.thinking;
    if (!thinking || thinking.over) return;
    thinking.over = true;
    thinking.summary.textContent = `Thought for ${seconds(performance.now() - thinking.since)}`;
  }

  end(trouble, stopped) {
    this.#thought();
    this.answer.end();
    this.waiting.remove();
    const foot = element("div", { class: "foot" });
    if (this.answer.text) foot.append(copyButton("Copy answer", () => this.answer.text));
    for (const note of this.#notes(stopped)) foot.append(element("span", {}, note));
    this.shown.append(foot);
    if (trouble) this.shown.append(element("p", { class: "trouble", role: "alert" }, trouble));
    this.speaker.end(stopped ? "The answer was stopped." : trouble ? "" : "The answer is complete.");
    this.follower.follow();
  }

  #notes(stopped) {
    const notes = [];
    if (stopped) notes.push("Stopped");
    else if (this.finish === "length") notes.push("Ended at the limit of tokens");
    else if (this.finish === "abort") notes.push("Broken off by the server");
    const count = this.usage?.completion_tokens;
    if (count) {
      notes.push(count === 1 ? "1 token" : `${count.toLocaleString("en")} tokens`);
      const time = this.last - this.first;
      if (count > 1 && time > 0) notes.push(`${(((count - 1) * 1000) / time).toPrecision(3)} tokens/s`);
    }
    notes.push(`first after ${seconds(this.first - this.began)}`);
    return notes;
  }

  remove() {
    this.asked.remove();
    this.shown.remove();
  }
}

function off(text) {
  return element("span", { class: "off-screen" }, text);
}

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(milliseconds < 9950 ? 1 : 0)} s`;
}
