"""Varied instructions for a chat model, made from templates: training and held-out prompts share neither templates nor fillers.

    python benchmarks/instructions.py build/instructions     # writes train.jsonl and held_out.jsonl, column "problem"

160 templates in eight kinds. Each fourth template, and the last quarter of each list of fillers, are held out.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

TEMPLATES = """
Explain {topic} to a ten-year-old.
Explain {topic} in three sentences.
What is {topic}, and why does it matter?
What is the difference between {topic} and {topic}?
Give a short history of {topic}.
Name three common misunderstandings about {topic}.
How does {topic} work?
What should a beginner know about {topic}?
Write an introduction to {topic} for a school book.
Summarise what scientists know about {topic}.
Which questions about {topic} are still open?
Describe {topic} with an analogy from the kitchen.
List five facts about {topic}.
What would happen without {topic}?
How is {topic} taught at universities?
Compare {topic} with {topic} in a short paragraph.
Who studies {topic}, and with which tools?
Write a quiz question about {topic} and its answer.
What are the practical uses of {topic}?
Define {topic} in one sentence, then give an example.
Write a short story about {person} who finds {thing}.
Write a poem of eight lines about {thing}.
Write a dialogue between {person} and {person} about {thing}.
Describe {place} at sunrise.
Invent a legend that explains why {place} has no {thing}.
Write the first paragraph of a novel that is set in {place}.
Write a letter from {person} to a friend, about {thing}.
Write a diary entry of {person} after a long day in {place}.
Tell a joke about {person}.
Write a riddle whose answer is {thing}.
Write a short speech in which {person} thanks the team.
Describe {thing} without naming it.
Write a news report: {person} was seen in {place} with {thing}.
Write a fairy tale with {person}, {thing} and a happy ending.
Continue this sentence into a paragraph: "When {person} opened the door, there was only {thing}."
Write a haiku about {place}.
Write a scene in which {person} loses {thing}.
Write a song text about {place}.
Invent a name and a slogan for a shop that sells {thing}.
Write a review of a film about {person} in {place}.
How do I {task}?
Give me a step-by-step guide to {task}.
What do I need before I {task}?
Which mistakes do people make when they {task}?
How long does it take to {task}, and why?
Write a checklist for someone who wants to {task}.
My friend wants to {task}. What should I tell them?
Is it a good idea to {task} alone? Give reasons.
How can I {task} with little money?
Explain to {person} how to {task}.
Make a plan for one week to learn how to {task}.
What is the hardest part when you {task}?
Which tools help to {task}?
Give three tips for people who {task} for the first time.
I tried to {task} and failed. What could have gone wrong?
Write a short email asking for help to {task}.
What should I do right after I {task}?
How do professionals {task}?
Turn this into polite words: "You must {task} now!"
What are the benefits of people who {task} often?
Write a Python function that {code}.
Write a JavaScript function that {code}.
Explain how a program that {code} works, without code.
Write a test for a function that {code}.
Which errors can occur in a program that {code}?
Write pseudocode that {code}.
How fast is a program that {code}? Explain the complexity.
Write a shell command that {code}.
Review this idea: a class with one method that {code}.
Write a docstring for a function that {code}.
Which data structure suits a program that {code}?
Write an SQL query for a table of orders that {code}.
Name good names for a function that {code}, and say why.
How would you debug a program that {code} but is too slow?
Write a short C program that {code}.
Explain recursion with a function that {code}.
What inputs should be refused by a function that {code}?
Write a command-line help text for a tool that {code}.
Describe an API with one endpoint that {code}.
Write a code comment that explains a loop that {code}.
A shop sells {thing} for {n} dollars. How much do {m} of them cost?
{person} has {n} apples and gives {m} away. How many are left? Explain.
A train needs {m} hours for {n} kilometres. What is its speed?
What is {n} plus {m}? Show your work.
What is {m} times {n}? Show your work.
Divide {n} by {m} and explain each step.
Is {n} a prime number? Explain.
What is {m} percent of {n}?
Write {n} as a sum of two numbers that differ by {m}.
{person} walks {m} kilometres each day. How far is that in {n} days?
A box holds {m} books. How many boxes are needed for {n} books?
Which is larger, {n} minutes or {m} hours? Explain.
Round {n} to the nearest ten and to the nearest hundred.
A rectangle is {n} by {m} metres. What are its area and its perimeter?
{person} reads {m} pages per hour. How long do {n} pages take?
If today is Monday, which day is it in {n} days?
Write {n} in words and in Roman numerals.
The sum of two numbers is {n}, one of them is {m}. What is the other? Explain.
A recipe for {m} people needs {n} grams of flour. How much is it per person?
Count from {m} to {m} plus ten and leave out multiples of three.
Plan a day in {place} for a family.
What should I pack for a week in {place}?
Is {place} worth a visit in winter?
Write a postcard from {place}.
What do people eat in {place}?
How do I get around in {place} without a car?
Compare living in {place} with living in {place}.
Suggest three quiet things to do in {place}.
Write a short guide to {place} for people in wheelchairs.
What should visitors not do in {place}?
Describe the weather in {place} through the year.
Write an advertisement for {place}.
Why do artists love {place}?
What would {person} like about {place}?
Write three questions that a tourist in {place} may ask, with answers.
How has {place} changed in a hundred years?
Plan a weekend in {place} with {m} dollars per person and day.
What can children learn in {place}?
Write a warning sign for {place}.
Describe the sounds and smells of {place}.
Rewrite this sentence in a formal style: "{sentence}"
Rewrite this sentence for a child: "{sentence}"
Translate into French: "{sentence}"
Translate into Spanish: "{sentence}"
Correct the grammar, if anything is wrong: "{sentence}"
What is the subject of this sentence: "{sentence}"
Write three sentences that mean the same as "{sentence}"
Write the opposite of this sentence: "{sentence}"
Is this sentence a fact or an opinion: "{sentence}" Explain.
Which feeling does this sentence express: "{sentence}"
Turn this sentence into a question and answer it: "{sentence}"
Make this sentence shorter: "{sentence}"
Make this sentence longer and more vivid: "{sentence}"
Write a headline for an article that begins: "{sentence}"
List the nouns and the verbs in: "{sentence}"
Reply to this message in a friendly way: "{sentence}"
Reply to this message and disagree politely: "{sentence}"
Write a paragraph that ends with: "{sentence}"
What might have happened before someone said: "{sentence}"
Put this sentence into the past tense: "{sentence}"
Should people {task}? Give one reason for and one against.
What are the advantages and disadvantages of {topic}?
Convince {person} that {topic} is interesting.
Give {person} advice on how to {task}.
Which job suits somebody who likes {thing} and {topic}?
Rank these by how useful they are, and say why: {thing}, {thing}, {topic}.
What present would you buy for {person}?
Sort these words by alphabet: {thing}, {place}, {person}.
Which of these does not belong with the others: {thing}, {thing}, {place}? Explain.
Make a table with three rows about {topic}: name, use, example.
Answer in JSON with the keys "name" and "reason": what is the best thing about {place}?
Write interview questions for {person} about {topic}.
What do {thing} and {topic} have in common?
Think step by step: would {thing} fit into a shoebox?
Write a short debate between {person} and {person} on {topic}.
How would life change if everybody could {task}?
Give feedback on this plan: learn {topic}, then {task}.
Ask me five questions to find out whether I understand {topic}.
What would you tell {person} who is afraid of {thing}?
Write a thank-you note for {thing}.
""".strip().splitlines()

FILLERS = {
    "topic": """photosynthesis, inflation, gravity, democracy, evolution, machine learning, the water cycle, vaccines, plate
        tectonics, electricity, the immune system, supply and demand, the French Revolution, climate change, black
        holes, DNA, friction, jazz, chess openings, probability, the printing press, coral reefs, nuclear energy,
        sleep, memory, magnetism, the stock market, volcanoes, antibiotics, perspective in painting, fermentation,
        encryption""",
    "person": """a retired pilot, a young baker, a shy librarian, an old fisherman, a nurse, a robot, a schoolteacher, a
        clockmaker, a farmer, a detective, a gardener, a violinist, an astronaut, a taxi driver, a beekeeper, a mayor""",
    "thing": """a rusty key, an umbrella, a broken radio, a silver spoon, a paper boat, a lantern, a blue bicycle, a wooden
        chair, a map, a glass marble, a woollen scarf, a typewriter, a kite, a music box, a telescope, a pair of
        boots, a teapot, a violin case""",
    "place": """a small harbour town, Lisbon, a desert village, Kyoto, a mountain hut, Nairobi, an old railway station,
        Toronto, a night market, Iceland, a lighthouse, Cape Town, a rainy forest, Prague, a floating market,
        Patagonia""",
    "task": """bake sourdough bread, change a bicycle tyre, learn a new language, plant tomatoes, paint a room, write a will,
        prepare for a job interview, build a bookshelf, run ten kilometres, save money, cook for twelve people, repair
        a zip, start a book club, adopt a dog, give a speech, clean a keyboard, plan a wedding, sleep better, read
        music, sew a button""",
    "code": """reverses a list, counts the words of a text, finds the largest number, removes duplicates, checks a password,
        sorts names by length, reads a CSV file, computes a factorial, merges two dictionaries, finds the shortest
        path, validates an email address, counts vowels, groups rows by month, rotates a matrix, parses a date, rounds
        prices""",
    "sentence": """The meeting was moved to Thursday because the room is being painted., I think the soup needs more salt.,
        Nobody expected the bridge to open before the winter., She forgot her keys and had to wait outside for an
        hour., This phone is far too expensive for what it does., We are looking forward to your visit next month.,
        The cat watched the rain and did not move., Our team finished the project two days early., He promised to call
        but he never did., The museum is closed on Mondays and on public holidays., Every child in the village knows
        this song., My neighbour plays the trumpet at midnight.""",
    "n": "144, 96, 250, 81, 365, 72, 1024, 512, 130, 57, 420, 199, 640, 888, 91, 1500",
    "m": "12, 7, 5, 9, 15, 4, 8, 3, 20, 6, 11, 25",
}
_HELD_OUT = 4  # each fourth template, and the last quarter of each list


def fillers(kind: str, held_out: bool) -> list[str]:
    """Those of training, or those that are held out; sentences end in a full stop, others do not."""
    separator = r"(?<=[.]),\s+" if kind == "sentence" else r",\s+"
    values = [" ".join(value.split()) for value in re.split(separator, FILLERS[kind])]
    cut = len(values) - len(values) // _HELD_OUT
    return values[cut:] if held_out else values[:cut]


def templates(held_out: bool) -> list[str]:
    """Those of training, or those that are held out."""
    return [
        text
        for place, text in enumerate(TEMPLATES)
        if (place % _HELD_OUT == _HELD_OUT - 1) == held_out
    ]


def instructions(seed: int, held_out: bool) -> Iterator[str]:
    """Distinct prompts, all templates in turn; ends when 1,000 draws in a row were seen before."""
    rng = random.Random(f"{seed}/{held_out}")
    chosen, seen, repeats = templates(held_out), set(), 0
    while repeats < 1000:
        rng.shuffle(chosen)
        for template in chosen:
            text = re.sub(
                r"\{(\w+)\}", lambda slot: rng.choice(fillers(slot[1], held_out)), template
            )
            if text in seen:
                repeats += 1
                continue
            seen.add(text)
            repeats = 0
            yield text


def write(folder: Path, training: int, held_out: int, seed: int = 0) -> tuple[Path, Path]:
    """The prompts as files that a recipe's `problems` can name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, count, kind in zip(paths, (training, held_out), (False, True), strict=True):
        texts = [text for text, _ in zip(instructions(seed, kind), range(count), strict=False)]
        path.write_text(
            "".join(json.dumps({"problem": text}) + "\n" for text in texts), encoding="utf-8"
        )
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--training", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=400)
    args = parser.parse_args()
    for path in write(args.folder, args.training, args.held_out):
        print(path)


if __name__ == "__main__":
    main()
