"""A run's chat format as a template for transformers, vLLM and their like, where the base has none.

What is merged and exported is then asked in the words that it was trained in.
"""

import json


def chat_template(tokenizer):
    """The format that a ChatTokenizer writes, as a jinja template.

    transformers' apply_chat_template makes the ids of our encode_prompt from it.
    """
    def text(parts):
        """A format's parts as text again: its control tokens by their names."""
        return "".join(tokenizer.tokenizer.id_to_token(part) if isinstance(part, int) else part
                       for part in parts)

    first, tail = text(tokenizer.first).split("{query}")
    before, later = text(tokenizer.later).split("{answer}")
    later = later.split("{query}")[0]
    end = text([tokenizer.answer.split("{answer}")[1], tokenizer.end])
    # a string of JSON is one of jinja's too, if it leaves letters as they are
    first, tail, before, later, end = (json.dumps(part, ensure_ascii=False)
                                       for part in (first, tail, before, later, end))
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {first} if loop.first else {later} }}}}"
        f"{{{{ message['content'] | trim }}}}{{{{ {tail} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {before} }}}}{{{{ message['content'] | trim }}}}"
        f"{{% if loop.last %}}{{{{ {end} }}}}{{% endif %}}"
        "{% else %}"
        "{{ raise_exception('this format knows the roles user and assistant alone') }}"
        "{% endif %}{% endfor %}")
