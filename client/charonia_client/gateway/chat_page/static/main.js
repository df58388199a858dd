// Puts the page together: fields, buttons, keys.

import { ApiError, listModels } from "./api.js";
import { Chat } from "./chat.js";
import { loadApiKey, loadSettings, saveApiKey, saveSettings } from "./store.js";

const byId = (id) => document.getElementById(id);
const FIELDS = ["system", "temperature", "top_p", "max_tokens"];
const NUMBERS = ["temperature", "top_p", "max_tokens"];
const WIDE = matchMedia("(min-width: 46.01rem)");

const model = byId("model");
const prompt = byId("prompt");
const notice = byId("notice");
const settings = loadSettings();

function keepSettings() {
  for (const field of FIELDS) settings[field] = byId(field).value;
  if (model.value) settings.model = model.value;
  saveSettings(settings);
}

function makeRequest(turns) {
  const system = byId("system").value.trim();
  const request = {
    model: model.value,
    messages: system ? [{ role: "system", content: system }, ...turns] : turns,
  };
  for (const field of NUMBERS) {
    if (byId(field).value !== "") request[field] = byId(field).valueAsNumber;
  }
  return request;
}

function showNotice(text) {
  notice.textContent = text;
  notice.hidden = !text;
}

async function loadModels() {
  try {
    const names = await listModels(byId("api-key").value);
    model.replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(settings.model)) model.value = settings.model;
    model.disabled = names.length === 0;
    showNotice(names.length ? "" : "The server has no model.");
  } catch (error) {
    showNotice(error instanceof ApiError ? error.message : "The server's list of models makes no sense.");
  }
}

function showSettings(shown) {
  byId("settings").hidden = !shown;
  byId("toggle-settings").setAttribute("aria-expanded", String(shown));
}

function growPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

const chat = new Chat({
  list: byId("messages"),
  empty: byId("empty"),
  makeRequest,
  apiKey: () => byId("api-key").value,
  announce: (text) => (byId("announcer").textContent = text),
  onState: (busy) => {
    const focused = document.activeElement;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    if (!busy && (focused === byId("stop") || focused === document.body)) prompt.focus();
  },
});

async function send() {
  const text = prompt.value.trim();
  if (!text || chat.busy) return;
  const invalid = NUMBERS.map(byId).find((field) => !field.checkValidity());
  if (invalid) {
    showSettings(true);
    invalid.reportValidity();
    return;
  }
  if (!model.value) await loadModels();
  if (!model.value || prompt.value.trim() !== text) return; // sent meanwhile, Enter having been pressed again
  prompt.value = "";
  growPrompt();
  await chat.send(text);
}

for (const field of FIELDS) {
  byId(field).value = settings[field] ?? "";
  byId(field).addEventListener("change", keepSettings);
}
model.addEventListener("change", keepSettings);
byId("api-key").value = loadApiKey();
byId("api-key").addEventListener("change", () => {
  saveApiKey(byId("api-key").value);
  loadModels();
});
byId("new-chat").addEventListener("click", () => {
  chat.clear();
  prompt.focus();
});
byId("toggle-settings").addEventListener("click", () => showSettings(byId("settings").hidden));
byId("stop").addEventListener("click", () => chat.stop());
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", growPrompt);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") chat.stop();
});

showSettings(WIDE.matches);
loadModels();
prompt.focus();
