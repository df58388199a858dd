// How one message looks.

import { showMarkdown } from "./markdown.js";

const NAMES = { user: "You", assistant: "Assistant" };
const ENDS = { length: "cut at max tokens", content_filter: "filtered", tool_calls: "asks for a tool" };

function make(name, className, text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

function button(label, onClick) {
  const made = make("button", "", label);
  made.type = "button";
  made.addEventListener("click", () => onClick(made));
  return made;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // no clipboard on a page that came over plain HTTP from another machine
  }
  const area = make("textarea", "hidden");
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  return copied;
}

async function copyFrom(pressed, message) {
  pressed.textContent = (await copy(message.content)) ? "Copied" : "Cannot copy";
  setTimeout(() => (pressed.textContent = "Copy"), 1500);
}

function statsOf(message) {
  const parts = [];
  if (message.stopped) parts.push("stopped");
  if (ENDS[message.finishReason]) parts.push(ENDS[message.finishReason]);
  if (message.tokens !== undefined) parts.push(`${message.tokens} tokens`);
  if (message.tokensPerSecond !== undefined) parts.push(`${message.tokensPerSecond.toFixed(1)} tokens/s`);
  if (message.firstTokenAfter !== undefined) parts.push(`first token after ${message.firstTokenAfter.toFixed(2)} s`);
  return parts.join(" · ");
}

export class MessageView {
  /** `onRegenerate` is called when the reader asks for another answer. */
  constructor(message, onRegenerate) {
    this.message = message;
    this.element = make("article", message.role);
    this.text = make("div", "text");
    this.element.append(make("h2", "", NAMES[message.role]), this.text);
    if (message.role === "assistant") this.#addParts(onRegenerate);
    this.update();
  }

  #addParts(onRegenerate) {
    this.reasoning = make("details");
    this.reasoningText = make("div");
    this.reasoning.append(make("summary", "", "Reasoning"), this.reasoningText);
    this.error = make("p", "error");
    this.error.role = "alert";
    this.stats = make("span", "stats");
    this.copy = button("Copy", (pressed) => copyFrom(pressed, this.message));
    this.regenerate = button("Regenerate", onRegenerate);
    const footer = make("footer");
    footer.append(this.copy, this.regenerate, this.stats);
    this.text.before(this.reasoning);
    this.element.append(this.error, footer);
  }

  /** Show what the message holds now. `isLast`: whether it is the one that can be made anew. */
  update({ busy = false, isLast = false } = {}) {
    const { message } = this;
    if (message.role === "user") {
      this.text.textContent = message.content;
      return;
    }
    this.element.setAttribute("aria-busy", String(busy));
    showMarkdown(this.text, message.content);
    this.reasoning.hidden = !message.reasoning;
    if (this.reasoningText.textContent !== message.reasoning) this.reasoningText.textContent = message.reasoning ?? "";
    this.error.hidden = !message.error;
    this.error.textContent = message.error ?? "";
    this.stats.textContent = statsOf(message);
    this.copy.hidden = busy || !message.content;
    this.regenerate.hidden = busy || !isLast;
  }
}
