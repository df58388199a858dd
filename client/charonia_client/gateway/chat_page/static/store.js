// What the browser keeps: the conversation and the settings; the API key for this tab only.

const CONVERSATION = "charonia.conversation";
const SETTINGS = "charonia.settings";
const API_KEY = "charonia.api-key";

function load(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function save(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    // storage is full or forbidden: the page works without
  }
}

/** Return the kept messages; what another version of the page left behind is ignored. */
export function loadConversation() {
  const kept = load(CONVERSATION, []);
  if (!Array.isArray(kept)) return [];
  return kept.filter((message) => ["user", "assistant"].includes(message?.role) && typeof message.content === "string");
}

export const saveConversation = (messages) => save(CONVERSATION, messages);

/** Return the kept settings: strings by the name of their field. */
export function loadSettings() {
  const kept = load(SETTINGS, {});
  return kept !== null && typeof kept === "object" ? kept : {};
}

export const saveSettings = (settings) => save(SETTINGS, settings);

export function loadApiKey() {
  try {
    return sessionStorage.getItem(API_KEY) ?? "";
  } catch {
    return "";
  }
}

export function saveApiKey(key) {
  try {
    sessionStorage.setItem(API_KEY, key);
  } catch {
    // forbidden: the key lasts as long as the page
  }
}
