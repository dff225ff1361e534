"""A PersonaFuse as lm-eval, EleutherAI's evaluation harness, wants a model."""

import json
from pathlib import Path

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data import Example
from experiments.answers import ask_model, cot_prompt, route_weights


class PersonaFuseLM(LM):
    """`model` for the harness; `tasks` by name, and the folder of the base.

    The router reads the question alone (the task's doc_to_text), not the worked examples that may
    stand before it. The base reads the harness's text in its chat format, as in training, or with
    --no-chat exactly as it stands.
    """

    def __init__(self, model, args, tasks, folder):
        super().__init__()
        self.model = model
        self.args = args
        self.tasks = tasks
        self.tokenizer = model.tokenizer
        self.context = model.base.config.max_position_embeddings
        # what a text without context is conditioned on
        config = json.loads((Path(folder) / "config.json").read_text())
        self.first = config.get("bos_token_id")
        if self.first is None:
            self.first = self.tokenizer.end

    # the three questions that the harness asks

    def loglikelihood(self, requests):
        """(log p(continuation | text), whether it is greedy decoding's) of each request."""
        pairs = [self.encode_pair(*request.args) for request in requests]
        return self.likelihoods(pairs, self.questions(requests))

    def loglikelihood_rolling(self, requests):
        """log p(text) of each request, a text longer than the context in windows."""
        sums = []
        for request in requests:
            text = request.args[0]
            windows = get_rolling_token_windows(self.encode(text), self.first, self.context, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            found = self.likelihoods(pairs, [text] * len(pairs))
            sums.append(sum(likelihood for likelihood, _ in found))
        return sums

    def generate_until(self, requests):
        """The greedy answer to each request, until what its own options say."""
        answers = [None] * len(requests)
        queries = self.questions(requests)
        kinds = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        # one set of options at a time
        for kind in sorted(set(kinds)):
            part = [i for i in range(len(requests)) if kinds[i] == kind]
            options = json.loads(kind)
            until = options.get("until") or []
            if isinstance(until, str):
                until = [until]
            found = ask_model(
                self.model,
                [requests[i].args[0] for i in part],
                self.args,
                options.get("max_gen_toks", 256),
                queries=[queries[i] for i in part],
                until=until,
                raw=self.args.no_chat,
            )
            for i, answer in zip(part, found):
                answers[i] = answer
        return answers

    # what they are made of

    def encode(self, text):
        return self.tokenizer.prefix + self.tokenizer.encode(text)

    def encode_pair(self, before, after):
        """A text and its continuation -> token ids of each.

        Without chat format they are encoded together, then parted, as the harness does.
        """
        if self.args.route == "cot":
            before = cot_prompt(before)
        if not self.args.no_chat:
            # the end token is no part of what is asked for
            answer = self.tokenizer.encode_answer(after.strip())[:-1]
            return self.tokenizer.encode_prompt(before), answer
        # a space between the two belongs to the token behind it
        text = before.rstrip()
        after = before[len(text):] + after
        if text:
            start = self.encode(text)
            return start, self.encode(text + after)[len(start):]
        ids = self.tokenizer.encode(after)
        if ids[0] == self.first:
            return ids[:1], ids[1:]
        return [self.first], ids

    def questions(self, requests):
        """What the router reads for each request."""
        queries = []
        for request in requests:
            if request.task_name in self.tasks:
                question = self.tasks[request.task_name].doc_to_text(request.doc)
                queries.append(str(question))
            else:
                queries.append(request.args[0])
        return queries

    def likelihoods(self, pairs, queries):
        """Pairs of token ids, cut on the left to fit the context -> (log p, greedy) of each."""
        examples = []
        for before, after in pairs:
            # the last token is never read, so it needs no place in the context
            kept = (before + after)[-self.context - 1:]
            examples.append(Example(kept[:-len(after)], after, [], ()))
        w = route_weights(self.model, queries, self.args)
        nll, _, greedy = self.model.response_nll(examples, w)
        return list(zip((-nll).tolist(), greedy.tolist()))
