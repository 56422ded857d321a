"""The chat that Fun-ASR-Nano is prompted with: instruction, context, and ids around the speech.

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\n{prompt}
    [rows of speech]
    <|im_end|>\\n<|im_start|>assistant\\n
    {text}<|im_end|>

Each of the three pieces of text is encoded by itself. Source: FunASR's FunASRNano and
MultiContextPrompt.
"""

from collections.abc import Sequence

from .byte_bpe import QwenTokenizer

SYSTEM = "You are a helpful assistant."
START, END = "<|im_start|>", "<|im_end|>"
NO_THINKING = "<think>\n\n</think>\n\n"
LANGUAGES = {  # codes -> the names that the models were trained with; Nano: the first and en, ja
    "zh": "中文", "en": "英文", "yue": "粤语", "ja": "日文", "ko": "韩文", "vi": "越南语",
    "id": "印尼语", "th": "泰语", "ms": "马来语", "fil": "菲律宾语", "ar": "阿拉伯语",
    "hi": "印地语", "bg": "保加利亚语", "hr": "克罗地亚语", "cs": "捷克语", "da": "丹麦语",
    "nl": "荷兰语", "et": "爱沙尼亚语", "fi": "芬兰语", "el": "希腊语", "hu": "匈牙利语",
    "ga": "爱尔兰语", "lv": "拉脱维亚语", "lt": "立陶宛语", "mt": "马耳他语", "pl": "波兰语",
    "pt": "葡萄牙语", "ro": "罗马尼亚语", "sk": "斯洛伐克语", "sl": "斯洛文尼亚语",
    "sv": "瑞典语",
}  # fmt: skip
HOTWORD_HEADER = (
    "请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。\n\n\n"
    "**上下文信息：**\n\n\n"
)
# MultiContextPrompt's, of training; the Chinese one for prompts that are mostly Chinese
CONTEXT_HEADERS = {
    "zh": (
        "请结合下面提供的上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。\n",
        {
            "hist_context": "历史转写结果：",
            "one_pass_result": "一遍解码结果：",
            "hotwords": "热词列表：",
        },
    ),
    "en": (
        "Please combine the context information provided below to complete the speech "
        "transcription task more accurately. If there is no relevant information, we will leave it "
        "blank.\n",
        {
            "hist_context": "Historical transcription: ",
            "one_pass_result": "One-pass result: ",
            "hotwords": "Hotword list: ",
        },
    ),
}


def language_name(language: str) -> str:
    """The name that a prompt has for a code or for itself. ValueError: neither is known."""
    known = LANGUAGES.get(language.lower(), language) if isinstance(language, str) else language
    if known not in LANGUAGES.values():
        listed = ", ".join(f"{code} ({name})" for code, name in LANGUAGES.items())
        raise ValueError(f"language is {language!r}, expected None or one of {listed}")
    return known


def instruction(language: str | None = None, hotwords: Sequence[str] = (), itn: bool = True) -> str:
    """The user's part of the prompt, as transcription has it.

    Args:
        language: of the speech: a name or a code of LANGUAGES; None: it is not said.
        hotwords: names and terms to expect.
        itn: False asks for a text as spoken, numbers in words.
    Raises:
        ValueError: an unknown language, hotwords that are no list of words.
    """
    if isinstance(hotwords, str) or not all(isinstance(word, str) for word in hotwords):
        raise ValueError(f"hotwords is {hotwords!r}, expected a list of words")
    for word in hotwords:
        if "<|" in word or not word.strip():
            raise ValueError(f"hotword {word!r} is empty or holds the mark <| of special tokens")
    prompt = HOTWORD_HEADER + f"热词列表：[{', '.join(hotwords)}]\n" if hotwords else ""
    prompt += "语音转写" if language is None else f"语音转写成{language_name(language)}"
    return prompt + ("：" if itn else "，不进行文本规整：")


def context_header(prompt: str, context: dict[str, str] | None = None) -> str:
    """What training puts before the instruction `prompt`: a header and what is known of the clip
    (`hist_context`, `one_pass_result`, `hotwords`), or three empty lines."""
    header, fields = CONTEXT_HEADERS["zh" if _is_chinese(prompt) else "en"]
    lines = [
        f"{title}{context[name]}\n" for name, title in fields.items() if (context or {}).get(name)
    ]
    return header + ("".join(lines) or "\n\n\n")


def _is_chinese(text: str) -> bool:
    chinese = sum("\u4e00" <= char <= "\u9fff" for char in text)
    latin = sum(char.isascii() and char.isalpha() for char in text)
    return not text or (chinese > latin and chinese / len(text) > 0.3)


def chat_ids(
    tokenizer: QwenTokenizer, prompt: str, system: bool = True, think: bool = True
) -> tuple[list[int], list[int]]:
    """Ids before and behind the rows of speech. `think` False closes an empty thought before the
    answer."""
    before = f"{START}system\n{SYSTEM}{END}\n" if system else ""
    behind = f"{END}\n{START}assistant\n" + ("" if think else NO_THINKING)
    return tokenizer.encode(f"{before}{START}user\n{prompt}"), tokenizer.encode(behind)


def answer_ids(tokenizer: QwenTokenizer, text: str) -> list[int]:
    """Ids of what the model is to say, its end included."""
    return tokenizer.encode(text + END)
