// The view follows what is added at the end of the page, until somebody scrolls up to read; then it stays where it is
// put, whatever comes, until it is back at the end.

const NEAR = 80; // pixels from the end that count as there

export class Follower {
  constructor() {
    this.following = true;
    this.at = scrollY;
    this.height = 0;
    addEventListener("scroll", () => this.#scrolled(), { passive: true });
  }

  /** Something was added. */
  follow() {
    if (this.following) this.toEnd();
  }

  /** Follows from now on. */
  toEnd() {
    this.following = true;
    // Not smoothly: an animation would begin anew with every token.
    scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
  }

  /** We scroll down only: upwards goes a person, or the browser because the page has become shorter. */
  #scrolled() {
    const { scrollHeight } = document.documentElement;
    if (scrollY < this.at && scrollHeight >= this.height) this.following = false;
    else if (scrollHeight - innerHeight - scrollY < NEAR) this.following = true;
    this.at = scrollY;
    this.height = scrollHeight;
  }
}
