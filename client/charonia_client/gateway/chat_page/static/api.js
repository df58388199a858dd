// The two calls of the API that this page makes.

/** An error of the API or the connection, with a message for the reader. */
export class ApiError extends Error {}

const at = (path) => new URL(path, document.baseURI);

function headers(apiKey) {
  const all = { "Content-Type": "application/json" };
  if (apiKey) all.Authorization = `Bearer ${apiKey}`;
  return all;
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(at(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = "";
  try {
    const body = await response.json();
    message = body.error?.message ?? body.message ?? "";
  } catch {
    // a proxy's page, or nothing: the status has to do
  }
  const lines = [String(message || response.statusText || "The server gave no reason.")];
  if (response.status === 401) lines.push("Put a valid API key into the settings.");
  const seconds = Number(response.headers.get("Retry-After"));
  if (seconds > 0) lines.push(`Try again in ${seconds} s.`);
  return new ApiError(`Error ${response.status}: ${lines.join("\n")}`);
}

/** Return the names of the models that are served. */
export async function listModels(apiKey) {
  const response = await call("v1/models", { headers: headers(apiKey) });
  return (await response.json()).data.map((model) => model.id);
}

/** Yield the data of every event of a stream, until it ends or says that it is done. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield data;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError("The connection ended before the answer was complete.");
}

/** Send a conversation; yield the chunks of the answer as they come. Aborting `signal` ends it on the server too. */
export async function* streamChat(request, apiKey, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: headers(apiKey),
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError("The server sent something that is not JSON.");
    }
    if (chunk.error) throw new ApiError(String(chunk.error.message ?? "The server gave no reason."));
    yield chunk;
  }
}
