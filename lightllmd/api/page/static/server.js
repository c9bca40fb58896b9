// The way to this server: addresses below the page's own, the API key, and errors as sentences.

const STORED = "lightllmd.key"; // in sessionStorage: gone with the tab, and sent nowhere by itself

export class Server {
  constructor() {
    this.key = read();
  }

  get headers() {
    return this.key ? { Authorization: `Bearer ${this.key}` } : {};
  }

  /** Throws what fetch throws. */
  fetch(path, options = {}) {
    const headers = { ...options.headers, ...this.headers };
    return fetch(new URL(path, document.baseURI), { ...options, headers, credentials: "same-origin" });
  }

  /** Returns why it can't be one; empty: it is used from now on. */
  use(key) {
    if (!/^[\x21-\x7e]+$/.test(key)) return "A key consists of letters, digits and signs of ASCII, without spaces.";
    this.key = key;
    try {
      sessionStorage.setItem(STORED, key);
    } catch {
      // Storage is switched off: it is kept until the page is left.
    }
    return "";
  }

  forget() {
    this.key = "";
    try {
      sessionStorage.removeItem(STORED);
    } catch {
      // There was nothing kept.
    }
  }
}

function read() {
  try {
    return sessionStorage.getItem(STORED) ?? "";
  } catch {
    return "";
  }
}

/** What an error's body says, in any shape that this server has. */
export function told(body) {
  const error = body?.error;
  const text = error?.message ?? body?.message ?? error;
  return typeof text === "string" ? text : "";
}

/** Of an answer with an error status. */
export async function refusal(response) {
  const text = told(await response.json().catch(() => null));
  // Where a key was known, it says what became of it.
  if (response.status === 401 && !/expired/.test(text)) return "The server asks for an API key that it knows.";
  const wait = Number(response.headers.get("Retry-After"));
  const again = wait > 0 ? ` Try again in ${wait} s.` : "";
  if (!text) return `The server answered with an error (${response.status}).${again}`;
  return `${sentence(text)}${again}`;
}

/** With a capital and a full stop. */
export function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
