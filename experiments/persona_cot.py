"""Persona-CoT (section 4.2 and Table 9 of the paper): the prompt that walks a model from the social
and the task cue to traits and a response, and the parser of what comes back.
"""

import re

from data import activation

PERSONA_COT = """\
Answer a user in five steps. Write every step down under its number, with the lines that are \
named there.

The user wrote:
<<<
{query}
>>>

Step 1: Read the social cue. What do tone, feeling and intent say about the person, and about how \
they want to be met?
Social cue: [one sentence]

Step 2: Read the task cue. What does the person want done, and what must an answer to it be: \
exact, inventive, brief, kind?
Task cue: [one sentence]

Step 3: Choose the personality traits that the answer should show to fit each cue. They are the \
answer's, not the user's:
somebody worried may need somebody calm. Choose one to four of these ten, and never both poles of \
one trait:
High Openness (imaginative, curious) or Low Openness (practical, conventional)
High Conscientiousness (organised, thorough) or Low Conscientiousness (flexible, spontaneous)
High Extraversion (lively, talkative) or Low Extraversion (quiet, reserved)
High Agreeableness (warm, supportive) or Low Agreeableness (blunt, challenging)
High Neuroticism (alert to what may go wrong) or Low Neuroticism (calm, confident)
Social traits: [names from this list with commas between them, or none]
Task traits: [names from this list with commas between them, or none]

Step 4: Plan how each of these traits will be heard in what the answer says, in its order and in \
its words.
Plan: [one sentence for each trait]

Step 5: Write what the user will read, showing the traits without naming them. Then explain how \
you showed them. End with:
##Response: [what the user will read]
##Persona Behavior Rationale: [how it shows the traits]
"""
FRIEND = """\
You and I are old friends having a relaxed chat. Keep it casual and warm, the way people talk \
over coffee: everyday words,
a bit of humour where it fits, no lists, nothing official. Here is what I want to talk about:
{query}"""

# a key of the record -> the prompt that makes it: Persona-CoT (Table 9), then what the baselines of
# section 6.1 learn from
PROMPTS = {"response": PERSONA_COT, "naive_response": "{query}", "human_like_response": FRIEND}

PARTS = ("social cue", "social trait", "task cue", "task trait", "response", "rationale")

# a heading stands at the start of a line, behind list numbers and bold marks, or anywhere behind ##
HEADING = re.compile(
    r"(?:^|(?<!#)(?=##))[ \t>#*_.)\d-]*(?:step[ \t]*\d+[ \t]*[:.)-]+[ \t#*_]*)?"
    r"(social cue|social traits?|task cue|task traits?|(?:final )?response|"
    r"(?:persona )?(?:behaviou?r )?rationale)"
    r"[ \t*_]*(?::[*_]*|$)", re.I | re.M)

# "High Openness", "**high** in openness", "Openness to Experience: High", "Openness (high)"
TRAIT = re.compile(
    r"(?:(?<![\w/])(high|low)[\s*_-]+(?:(?:in|on|levels? of)[\s*_]+)?)?"
    r"(openness|conscientiousness|extr[ao]version|agreeableness|neuroticism)(?: to experience)?"
    r"(?:[\s*_]*[:=(–-]+[\s*_]*(high|low)\b)?", re.I)


def read_traits(text):
    """What follows "Social traits:" -> trait names, of lines up to the first without a trait."""
    traits = []
    for line in filter(str.strip, text.splitlines()):
        if re.match(r"\W*reason", line, re.I):
            break
        pole = None
        found = []
        for match in TRAIT.finditer(line):
            before, trait, after = match.groups()
            # "High Openness and Extraversion" share a pole: one without its own has the last one's
            own = before or after or pole
            pole = after or before or pole
            if own:
                found.append(f"{own} {trait}".title().replace("Extro", "Extra"))
            # the rest of the line explains this trait
            if re.match("[*_ ]*(:|–|—|- )", line[match.end():]):
                break
        if not found:
            break
        traits += found
    return list(dict.fromkeys(traits))                  # each once, in their order


def parse_answer(text):
    """A model's answer to PERSONA_COT -> social_cue, social_traits, task_cue, task_traits, p,
    response and rationale, in a dict.

    ValueError is the reason to drop it: no response, no trait (p is all zeros), both poles of one.
    """
    text = text.replace("\r\n", "\n").rsplit("</think>", 1)[-1]
    pieces = HEADING.split(text)                        # before, heading, body, heading, body, ...
    found = dict.fromkeys(PARTS, "")
    for heading, body in zip(pieces[1::2], pieces[2::2]):
        part = next(part for part in PARTS if part in heading.lower())
        # "[your response]" is the prompt's own placeholder, and a heading may come first as a title
        content = re.sub(r"\[[^]]*\]", "", body) if part == "response" else body
        if re.search(r"\w", content):
            found[part] = body.strip()
        # some models go on with a query of their own: stop where the first answer ends
        if part == "rationale" and found["response"]:
            break
    # less a rule drawn below the response, less the talk that trails the rationale
    response = re.sub(r"(\s*\n[-*_`]{3,})+$", "", found["response"])
    rationale = re.split(r"\n\s*(?:#|-{3}|\*{3})", found["rationale"])[0].strip()
    if not response:
        raise ValueError("no response")
    social_traits = read_traits(found["social trait"])
    task_traits = read_traits(found["task trait"])
    return {
        "social_cue": found["social cue"].partition("\n")[0].strip("*_ "),
        "social_traits": social_traits,
        "task_cue": found["task cue"].partition("\n")[0].strip("*_ "),
        "task_traits": task_traits,
        "p": activation(social_traits + task_traits),
        "response": response,
        "rationale": rationale,
    }
