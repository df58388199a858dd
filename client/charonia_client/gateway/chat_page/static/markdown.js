// A small part of Markdown, made into DOM nodes. Text gets into the page as text nodes only, so nothing that a
// model writes can become markup; links and images are not made at all.

// The bounds keep the search linear in the length of the text.
const INLINE = /(`+)([^`]|[^`][\s\S]{0,2000}?[^`])\1(?!`)|\*\*(?=\S)([\s\S]{0,2000}?\S)\*\*|\*(?=[^\s*])([^*\n]{0,2000}?[^\s*])\*/g;
const BULLET = /^\s{0,8}[-*+]\s+/;
const NUMBER = /^\s{0,8}(\d{1,9})[.)]\s+/;
const HEADING = /^(#{1,6})\s+/;
const FENCE = /^\s{0,3}```/;

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    if (match[2] !== undefined) nodes.push(element("code", match[2]));
    else if (match[3] !== undefined) nodes.push(element("strong", match[3]));
    else nodes.push(element("em", match[4]));
  }
  nodes.push(text.slice(end));
  return nodes;
}

function kindOf(line) {
  if (FENCE.test(line)) return "fence";
  if (!line.trim()) return "blank";
  if (HEADING.test(line)) return "heading";
  if (BULLET.test(line)) return "bullets";
  if (NUMBER.test(line)) return "numbers";
  if (line.startsWith(">")) return "quote";
  return "text";
}

/** Cut text into blocks: what kind, which lines. A line of a list that continues an item belongs to it. */
function blocksOf(text) {
  const blocks = [];
  let block = null;
  for (const line of text.split("\n")) {
    if (block?.kind === "fence" && !block.closed) {
      if (FENCE.test(line)) block.closed = true;
      else block.lines.push(line);
      continue;
    }
    let kind = kindOf(line);
    const inList = block?.kind === "bullets" || block?.kind === "numbers";
    if (kind === "text" && inList && /^\s/.test(line)) kind = block.kind;
    if (kind === "blank" || kind === "heading" || kind === "fence" || kind !== block?.kind) {
      block = { kind, lines: [] };
      if (kind !== "blank") blocks.push(block);
    }
    if (kind !== "fence") block.lines.push(line);
  }
  return blocks;
}

function list(name, marker, lines) {
  const items = [];
  for (const line of lines) {
    if (marker.test(line)) items.push(line.replace(marker, ""));
    else items.push(`${items.pop() ?? ""}\n${line.trim()}`);
  }
  return element(name, ...items.map((item) => element("li", ...inline(item))));
}

function render({ kind, lines }) {
  const text = lines.join("\n");
  switch (kind) {
    case "fence":
      return element("pre", element("code", text));
    case "heading":
      return element(`h${Math.min(6, 2 + HEADING.exec(text)[1].length)}`, ...inline(text.replace(HEADING, "")));
    case "bullets":
      return list("ul", BULLET, lines);
    case "numbers": {
      const made = list("ol", NUMBER, lines);
      made.start = Number(NUMBER.exec(lines[0])[1]);
      return made;
    }
    case "quote":
      return element("blockquote", ...inline(lines.map((line) => line.replace(/^>\s?/, "")).join("\n")));
    default:
      return element("p", ...inline(text));
  }
}

/** Show `text` in `target`, leaving alone the blocks that have not changed since the last time. */
export function showMarkdown(target, text) {
  const shown = target.renderedBlocks ?? [];
  const blocks = blocksOf(text).map((block) => ({ ...block, source: `${block.kind}\n${block.lines.join("\n")}` }));
  let same = 0;
  while (same < blocks.length && same < shown.length && blocks[same].source === shown[same]) same += 1;
  while (target.childNodes.length > same) target.lastChild.remove();
  target.append(...blocks.slice(same).map(render));
  target.renderedBlocks = blocks.map((block) => block.source);
}
