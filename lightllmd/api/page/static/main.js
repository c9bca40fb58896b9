// Puts the page together.

import { Chat } from "./chat.js";
import { byId, setText } from "./dom.js";
import { Server } from "./server.js";
import { Status } from "./status.js";

const NARROW = matchMedia("(max-width: 59.99rem)");
const WORDS = {
  chat: ["Ask something.", "The conversation stays in this tab; the server keeps nothing of it.", "Message"],
  text: ["Begin a text.", "This model has no chat template: it goes on with what you write, each time from there.", "Text"],
};

const server = new Server();
const chat = new Chat(server, { parameters, onKey: () => askForKey("The key is not accepted.") });
const status = new Status(server, {
  onState(state) {
    chat.heed(state.ready);
    unlock();
    serve(state.kind);
  },
  onLocked: () => askForKey(server.key ? "The key is not accepted." : ""),
});

// --- what the model is for

function serve(kind) {
  const chats = kind in WORDS;
  for (const note of document.querySelectorAll("[data-for]")) note.hidden = note.dataset.for !== kind;
  byId("conversation").hidden = !chats;
  if (!chats) return;
  chat.kind = kind;
  const [title, more, label] = WORDS[kind];
  setText(byId("welcome-title"), title);
  setText(byId("welcome-more"), more);
  setText(byId("question-label"), label);
  byId("question").placeholder = label;
  byId("system-field").hidden = kind !== "chat";
}

// --- the key

function askForKey(trouble) {
  const form = byId("key-form");
  setText(byId("key-trouble"), trouble);
  if (!form.hidden) return;
  form.hidden = false;
  byId("forget").hidden = true;
  if (!byId("log").childElementCount) byId("conversation").hidden = true;
}

function unlock() {
  byId("key-form").hidden = true;
  byId("forget").hidden = !server.key;
}

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = byId("key");
  const trouble = server.use(field.value.trim());
  setText(byId("key-trouble"), trouble);
  if (trouble) return;
  await status.look();
  if (!byId("key-form").hidden) return field.select();
  field.value = "";
  byId("question").focus();
});

byId("forget").addEventListener("click", () => {
  server.forget();
  chat.clear();
  byId("forget").hidden = true;
  if (!status.required) return;
  status.lock();
  askForKey("");
  byId("key").focus();
});

// --- asking

/** Of the next request, those that are filled in; null: one of them is not valid, and is shown. */
function parameters() {
  const fields = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens", seed: "seed" };
  const given = { system: byId("system").value.trim() };
  for (const [name, id] of Object.entries(fields)) {
    const field = byId(id);
    if (!field.checkValidity()) {
      byId("parameters").open = true;
      field.reportValidity();
      return null;
    }
    if (field.value !== "") given[name] = Number(field.value);
  }
  return given;
}

const question = byId("question");

async function ask() {
  const text = question.value;
  if (!text.trim() || chat.busy) return;
  question.value = "";
  grow();
  question.focus();
  const answered = await chat.ask(text);
  if (!answered && !question.value) question.value = text;
  grow();
}

/** Where the browser can't size a field by what it holds. */
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  // Enter that ends the choice of a character (229: as Safari says it) sends nothing.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chat.busy && !event.isComposing) chat.stop();
});
byId("stop").addEventListener("click", () => chat.stop());
byId("new").addEventListener("click", () => {
  chat.clear();
  question.focus();
});

// --- begin

if (NARROW.matches) byId("status").open = false;
NARROW.addEventListener("change", () => (byId("status").open = !NARROW.matches));
if (document.body.dataset.locked === "true") {
  if (!server.key) askForKey("");
} else {
  serve(document.body.dataset.kind);
  unlock();
}
status.look();
