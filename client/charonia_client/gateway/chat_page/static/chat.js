// The conversation: one answer at a time is asked for, shown as it comes, and kept.

import { ApiError, streamChat } from "./api.js";
import { MessageView } from "./message_view.js";
import { loadConversation, saveConversation } from "./store.js";

const NEAR_END = 60; // pixels from the end within which the view follows the answer

export class Chat {
  #views = [];
  #running = null;

  /**
   * `list` holds the messages; `makeRequest(messages)` adds model and settings to them; `apiKey()` returns the key;
   * `onState(busy)` hears when an answer begins and ends, `announce(text)` what a screen reader should say.
   */
  constructor({ list, empty, makeRequest, apiKey, onState, announce }) {
    Object.assign(this, { list, empty, makeRequest, apiKey, onState, announce });
    for (const message of loadConversation()) this.#add(message);
    this.#refresh();
    this.#scrollToEnd();
  }

  get busy() {
    return this.#running !== null;
  }

  async send(text) {
    this.#add({ role: "user", content: text });
    await this.#answer();
  }

  async regenerate() {
    if (this.busy || this.#views.at(-1)?.message.role !== "assistant") return;
    this.#views.pop().element.remove();
    await this.#answer();
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    for (const view of this.#views) view.element.remove();
    this.#views = [];
    this.#running = null;
    this.#save();
    this.#refresh();
    this.onState(false);
  }

  #add(message) {
    const view = new MessageView(message, () => this.regenerate());
    this.#views.push(view);
    this.list.append(view.element);
    return view;
  }

  #save() {
    saveConversation(this.#views.map((view) => view.message));
  }

  #refresh() {
    this.empty.hidden = this.#views.length > 0;
    for (const view of this.#views) {
      const isLast = view === this.#views.at(-1);
      view.update({ busy: isLast && this.busy, isLast });
    }
  }

  #scrollToEnd() {
    this.list.scrollTop = this.list.scrollHeight;
  }

  /** What is sent: user and assistant in turns, as many templates want it; a question without an answer is left out. */
  #turns() {
    const turns = [];
    for (const { message } of this.#views) {
      if (message.role === "assistant" && !message.content) turns.pop();
      else turns.push({ role: message.role, content: message.content });
    }
    return turns;
  }

  async #answer() {
    const request = this.makeRequest(this.#turns());
    const message = { role: "assistant", content: "", reasoning: "" };
    const view = this.#add(message);
    const controller = new AbortController();
    this.#running = controller;
    this.#refresh();
    this.#save();
    this.#scrollToEnd();
    this.onState(true);
    try {
      await this.#receive(request, message, view, controller.signal);
    } catch (error) {
      if (controller.signal.aborted) message.stopped = true;
      else if (error instanceof ApiError) message.error = error.message;
      else {
        message.error = "The page could not make sense of the answer.";
        console.error(error);
      }
    }
    if (this.#running !== controller) return; // the conversation was cleared meanwhile
    this.#running = null;
    this.#follow(() => this.#refresh());
    this.#save();
    this.onState(false);
    if (!message.error) this.announce(message.stopped ? "Stopped" : "The answer is complete");
  }

  async #receive(request, message, view, signal) {
    const began = performance.now();
    let first = null;
    let last = began;
    let frame = 0;
    const show = () => {
      frame = 0;
      this.#follow(() => view.update({ busy: true }));
    };
    try {
      for await (const chunk of streamChat(request, this.apiKey(), signal)) {
        const choice = chunk.choices?.[0];
        const delta = choice?.delta ?? {};
        const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
        if (delta.content || reasoning) {
          last = performance.now();
          first ??= last;
          message.firstTokenAfter = (first - began) / 1000;
          message.content += delta.content ?? "";
          message.reasoning += reasoning;
        }
        if (choice?.finish_reason) message.finishReason = choice.finish_reason;
        if (chunk.usage) {
          message.tokens = chunk.usage.completion_tokens;
          if (message.tokens > 1 && last > first && first !== null) {
            message.tokensPerSecond = ((message.tokens - 1) / (last - first)) * 1000;
          }
        }
        if (!frame) frame = requestAnimationFrame(show);
      }
    } finally {
      cancelAnimationFrame(frame);
    }
  }

  /** Change the view, keeping its end in sight if it was. */
  #follow(change) {
    const { list } = this;
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < NEAR_END;
    change();
    if (atEnd) this.#scrollToEnd();
  }
}
