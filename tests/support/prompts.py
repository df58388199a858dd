"""Prompts of every kind that greedy output is compared on, from 1 token to 2,000."""

from pydoc_data.topics import topics

from charonia.text import Tokenizer
from charonia.text.chat import render_chat

TEXTS: dict[str, str] = {
    "one letter": "A",
    "one word": " the",
    "one newline": "\n",
    "one emoji": "🙂",
    "name": "Hello, my name is",
    "capital": "The capital of France is",
    "count": "1, 2, 3, 4, 5,",
    "repetition": "tick tock tick tock tick tock",
    "shouting": "WARNING: DO NOT OPEN THE",
    "spaces": "a    b        c                d",
    "tabs": "id\tname\tprice\n1\tapple\t0.40\n2\tpear\t",
    "trailing space": "Once upon a time, in a small village by the sea, there lived a ",
    "recipe": "Ingredients for pancakes:\n- 2 eggs\n- 250 ml milk\n-",
    "arithmetic": "12 + 30 = 42\n17 + 25 = 42\n20 + 15 =",
    "quote": '"To be, or not to be, that is the',
    "letter": "Dear Sir or Madam,\n\nI am writing to",
    "definition": "Photosynthesis is the process by which",
    "dialogue": "Alice: Where are we going?\nBob: To the station.\nAlice:",
    "url": "https://www.python.org/doc/",
    "date": "2024-01-01, 2024-01-02, 2024-01-03,",
    "python": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "python class": "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self",
    "c": "#include <stdio.h>\n\nint main(void) {\n    printf(",
    "rust": "fn main() {\n    let numbers = vec![1, 2, 3];\n    for",
    "sql": "SELECT name, COUNT(*) FROM users WHERE age > 30 GROUP BY",
    "json": '{"name": "Ada", "born": 1815, "languages": ["English", "French"], "',
    "html": "<html>\n<head><title>Test</title></head>\n<body>\n<h1>",
    "shell": "#!/bin/sh\nset -e\nfor file in *.txt; do\n",
    "latex": "\\begin{equation}\n  E = m c^2\n\\end{equation}\nwhere $E$ is",
    "german": "Der schnelle braune Fuchs springt über den",
    "french": "Il était une fois une princesse qui",
    "spanish": "En un lugar de la Mancha, de cuyo nombre",
    "russian": "Москва является столицей",
    "greek": "Η Αθήνα είναι η πρωτεύουσα",
    "chinese": "中国的首都是",
    "japanese": "日本の首都は東京です。",
    "korean": "안녕하세요, 저는",
    "arabic": "مرحبا بالعالم",
    "hindi": "भारत की राजधानी",
    "hebrew": "שלום עולם",
    "emoji": "I love pizza 🍕 and 🐍 and 👩‍💻 because",
    "combining": "Z̸a̷l̶g̴o̵ text is é̂",
    "mathematics": "∀x ∈ ℝ: x² ≥ 0 ⇒",
    "special tokens": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
}
"""Texts by name, short enough to be run often."""

CHATS: dict[str, list[dict[str, str]]] = {
    "chat": [{"role": "user", "content": "What is the tallest mountain on Earth?"}],
    "chat with a system message": [
        {"role": "system", "content": "You are a pirate. Answer in one sentence."},
        {"role": "user", "content": "How do I boil an egg?"},
    ],
    "chat of several turns": [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Name another one. 🎨"},
    ],
}

LONG: dict[str, tuple[str, int]] = {
    "page of 130 tokens": ("assert", 130),
    "page of 257 tokens": ("assignment", 257),
    "page of 600 tokens": ("formatstrings", 600),
    "page of 2,000 tokens": ("typesseq", 2000),
}
"""Topic of Python's built-in documentation, and how many tokens of it."""


def parity_prompts(tokenizer: Tokenizer, *, long: bool = True) -> dict[str, list[int]]:
    """Token ids by name; without `long`, only those of up to a few dozen tokens."""
    found = {name: tokenizer.encode(text) for name, text in TEXTS.items()}
    for name, messages in CHATS.items():
        found[name] = tokenizer.encode(render_chat(tokenizer, messages), add_special_tokens=False)
    if long:
        for name, (topic, length) in LONG.items():
            found[name] = tokenizer.encode(topics[topic])[:length]
    return found
