"""Sentences that are cut inside a word, at a place where the cut word has other tokens than the whole one."""

from __future__ import annotations

_SENTENCES = """
The capital of France is Par|is.
Water is made of hydrogen and oxy|gen.
The three primary colours are red, yellow and bl|ue.
The chemical process by which plants make food from light is called photosyn|thesis.
The largest planet in the solar system is Jupi|ter.
William Shakespeare wrote Romeo and Jul|iet.
He opened the door and walked into the kit|chen.
She went to the library to borrow a bo|ok.
The opposite of hot is col|d.
The United States of Amer|ica.
Albert Einstein developed the theory of relat|ivity.
The human heart pumps blo|od through the body.
The Second World War ended in nineteen forty-fi|ve.
We had breakfast in the morn|ing.
The doctor told the patient to take the medi|cine.
The children were playing football in the gar|den.
The study of living organisms is called biol|ogy.
My favourite season is sum|mer.
Charles Darwin proposed the theory of evol|ution by natural selection.
It is raining, so don't forget your umb|rella.
The students asked their tea|cher a question.
A triangle has three sides and three ang|les.
The Great Wall of Chi|na.
You can see the stars in the night s|ky.
The government announced a new economic pol|icy.
The Pacific Ocean is the largest oc|ean in the world.
The pilot landed the airpl|ane safely.
Once upon a time, there was a beautiful prin|cess who lived in a castle.
Machine learning is a branch of artificial intel|ligence.
The Roman Emp|ire fell in the year 476.
Please wash your hands with soap and wat|er.
The company reported record prof|its this quarter.
The opposite of war is pea|ce.
The president gave a speech in front of the White Hou|se.
Bees make hon|ey.
The orchestra played a symphony by Ludwig van Beetho|ven.
Climate change is caused by greenhouse gas emis|sions.
He broke his leg and was taken to the hosp|ital.
The detective solved the mys|tery.
In mathematics, the Pythagorean theo|rem is about right triangles.
New York City is the most populous city in the United Sta|tes.
Smoking increases the risk of lung can|cer.
The Declaration of Indepen|dence was signed in 1776.
Neil Armstrong was the first man to walk on the mo|on.
"""

# (the prompt, the rest of the word that it is cut in)
CUT_WORDS = [
    (prompt, rest.split(" ")[0].rstrip(".,"))
    for prompt, rest in (line.split("|") for line in _SENTENCES.strip().splitlines())
]
