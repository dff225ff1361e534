"""What a model answers to many questions: each in the chat format, with its own mix of experts,
generated many at a time.
"""

from tqdm import tqdm

from data import PERSONA_COT, parse_answer
from experiments.batched import generate_batch

# the steps of Persona-CoT come before the response, and need room of their own
COT_TOKENS = 512


def cot_prompt(text):
    """Persona-CoT (Table 9 of the paper) around a query."""
    return PERSONA_COT.replace("{query}", text)


def cot_response(answer):
    """The response in an answer to Persona-CoT; all of it where it does not keep to the format."""
    try:
        return parse_answer(answer)["response"]
    except ValueError:
        return answer


def route_weights(model, queries, args):
    """w (n, E) as --route, --top-k and --seed say, or None for the bare base."""
    # with cot it is the bare base that is prompted
    route = "none" if args.route == "cot" else args.route
    return model.mixing_weights(queries, route, args.top_k, args.seed)


def ask_model(model, texts, args, max_new_tokens, queries=None, until=(), raw=False):
    """Texts -> greedy answers, the experts mixed for `queries` (default: the texts).

    With --route cot the bare base answers through the Persona-CoT prompt, and its response counts.
    An answer ends before the first of the strings `until`. `raw` texts have no chat format.
    """
    w = route_weights(model, queries or texts, args)
    with_cot = args.route == "cot"
    if with_cot:
        texts = [cot_prompt(text) for text in texts]
    if raw:
        prompts = [model.tokenizer.prefix + model.tokenizer.encode(text) for text in texts]
    else:
        prompts = [model.tokenizer.encode_prompt(text) for text in texts]

    context = model.base.config.max_position_embeddings
    if with_cot:
        room = context - max(len(prompt) for prompt in prompts)
        max_new_tokens = max(max_new_tokens, min(max_new_tokens + COT_TOKENS, room))
    max_new_tokens = min(max_new_tokens, context // 2)
    answers = respond(model, prompts, w, max_new_tokens, until)
    if with_cot:
        answers = [cot_response(answer) for answer in answers]
    if raw:
        return answers
    return [answer.strip() for answer in answers]


def respond(model, prompts, w, max_new_tokens, until=(), temperature=0.0, top_p=1.0, seed=0):
    """Prompts (token ids, cut on the left to fit), w (n, E) or None -> answers, each ended before
    the first of the strings `until`.
    """
    room = model.base.config.max_position_embeddings - max_new_tokens
    # like lengths run side by side: the cache is read as far as the longest
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    prompts = [prompts[i][-room:] for i in order]
    if w is not None:
        w = w[order]
    answers = [[] for _ in prompts]
    finished = set()
    tokens = generate_batch(
        model.base, prompts, max_new_tokens, model.tokenizer.stop, w,
        temperature=temperature, top_p=top_p, seed=seed, finished=finished,
    )
    with tqdm(total=len(prompts), desc="answers", leave=False) as progress:
        for k, token in tokens:
            ids = answers[order[k]]
            if token is None:
                progress.update()
                continue
            ids.append(token)
            # a string may be spread over several tokens: look at the last few together
            end = model.tokenizer.decode(ids[-24:]) if until else ""
            if any(stop in end for stop in until):
                finished.add(k)
    return [cut_before(model.tokenizer.decode(ids), until) for ids in answers]


def cut_before(text, until):
    """The text before the first of the strings `until`."""
    ends = [text.index(stop) for stop in until if stop in text]
    return text[:min(ends, default=len(text))]
