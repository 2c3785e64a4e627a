"""Write the emotions that ship: lora_sentiment/bundled/emotions/, 400 texts, CC0.

python scripts/write_emotions.py FOLDER

Every sentence below was written for this project. A text joins one to three of them, in a drawn
order. No sentence stands in two splits, so test asks for sentences that training never saw.
"""

import json
import random
import sys
from pathlib import Path

SENTENCES = {
    "joy": """
I danced round the kitchen with the tea towel on my head.
We laughed until the waiter came over to ask what was so funny.
Best birthday I've had since I was nine.
The whole street came out to sing and I haven't stopped smiling.
She got the job, and I ran out into the garden and whooped.
Everything about today was golden.
My daughter scored twice and I shouted myself hoarse.
First swim of the year, and I came out of the sea grinning like a fool.
The bread rose, the sun came out, and I sang all morning.
He passed! We opened the good bottle at eleven in the morning.
I could hug every person on this bus.
Nothing beats the first warm evening on the balcony with old friends.
I've been humming that tune since the concert and I don't want it to end.
The puppy fell asleep on my foot and my week is made.
We won the pub quiz by one point and carried Nora home on our shoulders.
It's snowing, school is shut, and the children are wild with delight.
I bounced out of that interview feeling ten feet tall.
What a glorious, silly, perfect afternoon.
My tomatoes took second prize and I'm thrilled to bits.
I woke up early just to look at the new flat again.
Grandad told the one about the goat and we all cried with laughter.
The band played our song and the whole tent bounced.
I've finally finished the marathon and I'm flying.
There were pancakes, there was a kite, there was no rain at all.
Two weeks of holiday start now and I feel light as a feather.
We saw dolphins from the ferry, five of them, and everybody cheered.
I love this silly job on days like this.
The choir got it right at last and the hall lit up.
My brother is engaged and the family chat is nothing but confetti.
I skipped, actually skipped, to the station.
""",
    "sadness": """
The house is so quiet now that the dog is gone.
I sat in the car outside her flat and cried for an hour.
He would have been sixty today.
I keep setting the table for two.
We closed the shop for the last time tonight and nobody knew what to say.
I miss the way she hummed over the washing up.
Nobody came to the reading, and I packed the chairs away alone.
The letter said no again, and I went back to bed.
I haven't felt like myself since the funeral.
All her plants died, one after the other, and I couldn't stop it.
My best friend moved to the other side of the world this morning.
I looked through the old photos and had to stop halfway.
They sold the house I grew up in.
It's the second winter without him and it isn't getting lighter.
The doctor shook his head and I knew.
I eat in front of the window because there's no one to talk to.
Twenty years in the band and it ended with a text message.
My eyes are swollen and I've run out of tissues.
We had hoped until the very last day.
I found his glasses in the coat pocket and that was me finished.
She didn't recognise me when I visited on Sunday.
The nursery is painted and there won't be a baby.
Everyone else seems to have somewhere to be tonight.
I wanted so much to go home, and there's no home to go to.
We buried the cat under the apple tree in the rain.
It hurts more than I tell people.
I read his last message every night before I sleep.
The chair by the fire stays empty.
I don't see the point of decorating this year.
The team folded, and with it went my only evening out.
""",
    "anger": """
They charged me three times and then hung up on me.
Who parks across a wheelchair ramp and walks off laughing?
I have told them four times, and if I have to say it again I'll scream.
He read my diary out loud at dinner, and I threw the plate at the wall.
How dare they cut the night bus without asking anyone who rides it.
I slammed the door so hard that the glass cracked.
That lying weasel blamed the whole mess on me.
Enough. I'm done being talked over in every single meeting.
The landlord kept the deposit for a stain that was there before us.
I'm fuming, and I've every right to be.
Somebody kicked my bike to pieces for fun.
You do not speak to my mother like that.
Six weeks waiting for a form letter with the wrong name on it, what an insult.
My blood boils each time I see that poster.
They promised in writing, and now they deny it to my face.
The neighbours' drill began at five again, and I could have torn it out of his hands.
I spat out my coffee when I read their so-called apology.
Stop touching my things!
He took credit for her work in front of everyone, the snake.
I wrote them a letter that would strip paint.
Absolute cowards, the lot of them.
I've never been treated with such contempt at any counter.
They let her sit in that corridor for nine hours, and heads should roll.
I hung up before I said something I'd be sued for.
What kind of person steals flowers off a grave?
It's outrageous that nobody in charge will answer a simple question.
My jaw hurts from clenching it through that whole speech.
He laughed at the stutter, and I saw red.
Don't tell me to calm down.
They poisoned the river and paid less than a parking fine.
""",
    "fear": """
Somebody was trying the door handle at three in the morning.
My hands wouldn't stop shaking the whole way down the mountain.
I can't open the envelope from the hospital.
There were footsteps behind me, and when I stopped they stopped.
The lump hasn't gone away, and I lie awake counting the days to the scan.
The plane dropped and I grabbed a stranger's arm.
I'm dreading the exam so much that I can't eat.
What if they find out and send us back?
The water was rising up the stairs, and we had no phone.
I froze on the stage with my heart in my throat.
I check the locks five times, and still I don't sleep.
The dog wouldn't go near the cellar, and neither would I.
He has my address now, and I'm scared to walk home.
I hid in the bathroom until the shouting was over.
One wrong step on that ledge, and I'd never have seen my children again.
My stomach turns whenever the boss writes 'have you got a minute'.
The smoke alarm went off and I couldn't find my son.
I keep thinking about the brakes and what would have happened.
Please tell me it's only the wind.
I've a bad feeling about this crossing.
She hasn't answered since midnight, and I'm imagining the worst.
My knees buckled when the big man stepped out of the hedge.
The closer the operation gets, the less I can breathe.
I wouldn't go back into that forest after dark for any money.
They're laying people off on Monday, and I have two kids.
The spider dropped onto my pillow, and I was out of the window.
I sat with my back to the wall, watching the door.
The lift stopped between two floors, and the light went out.
I can't look at the news, in case it's our town.
Every siren makes me jump.
""",
    "surprise": """
I opened the cupboard, and there was a hedgehog in the flour.
Wait, you two are sisters?
Nobody had told me, so I walked in on forty people in party hats.
I read the number three times, because it couldn't be right.
Of all people to meet on a beach in Chile, my old maths teacher!
I never in my life thought that old engine would start.
She turned round, and she had shaved off all her hair.
Turns out the quiet lad from accounts is a champion wrestler.
I had to sit down when I heard who had bought the pub.
The parcel I posted in 1998 arrived today.
Well, I didn't see that coming.
He took off the mask, and it was my own father.
My jaw dropped when the bill came to exactly zero.
Snow, in June, here?
I nearly fell off my stool when the parrot answered in Dutch.
Twins, it said, plain as day, on the screen.
How on earth did the goat get onto the roof?
I pulled on a loose board and found a whole staircase behind it.
And then, out of nowhere, she proposed to him.
The last thing I expected in that box was a live tortoise.
Since when does grandma have a motorbike?
I blinked twice, but the name on the door was still mine.
The twist on the last page made me drop the book.
You could have knocked me down with a feather.
They said the tickets were for tonight, not next year, and I just stared.
I had no idea he could sing, none of us had.
The examiner stood up and bowed, and I thought it was a joke.
There was a message in the bottle, an actual message.
What, already? It was supposed to take until spring.
My phone rang, and it was the prime minister's office.
""",
    "gratitude": """
Whoever handed in my wallet with all the money in it, bless you.
I owe that nurse more than I can ever say.
You stayed on the line with me all night, and I won't forget it.
My neighbours cooked for us for a whole month, unasked.
If it weren't for Mrs Okafor I would have left school at fifteen.
Thank you for the lift, the soup and the dry socks.
I sent the ambulance crew a cake, and it's nowhere near enough.
He lent us the van and wouldn't take a penny.
I hope one day I can do for somebody what you did for me.
To the stranger who held my umbrella over the pram: you're a star.
We can't repay you, but there'll always be a bed for you here.
She taught me for free because she knew we had nothing.
I'm so lucky to have a sister who drops everything and comes.
Much obliged to the lad who carried my shopping up five floors.
Your kind words got me through the darkest week, thanks.
I appreciate every one of you who wrote to the council for us.
The donor is anonymous, so I say it here: my boy is alive because of you.
They kept my job open for a year, and I'll never take that for granted.
Cheers to the driver who waited when he saw me running.
It means the world that you came all this way.
I've written thirty cards, and I meant each one.
Hats off to the volunteers who searched until they found her.
My gran left me her recipes, and I bless her with each loaf.
You believed me when no one else did.
A big thank you to the library, which let us sit in the warm.
I keep the coach's note in my purse, because he saw something in me.
Without your translation we would have been lost at that office.
How can I ever thank the man who pulled us out?
What a gift it is to have been loved like that.
I'm indebted to the team who worked through Christmas for us.
""",
    "": """
The meeting has been moved to room 204.
Bus 14 leaves every twelve minutes on weekdays.
The parcel weighs two kilos and comes in a brown box.
Turn left at the chemist's and go on to the roundabout.
The shop is open from nine to half past five.
Add the flour and stir for about a minute.
My sister lives on the third floor of the block by the canal.
The form has two pages and must be signed on the second.
There are eleven chairs in the hall and a piano.
I wrote the list on the back of an envelope.
The second edition has an index and three maps.
We take the early train on Tuesdays and the late one on Fridays.
The curtains are blue, and the carpet is grey.
The museum keeps the coins on the first floor.
Water the plant once a week and turn it now and then.
The printer uses the same paper as the old one.
It was a Thursday, and the market was on.
The ferry takes cars on the lower deck.
Her office is at the end of the corridor.
The receipt is in the drawer under the till.
They repainted the bridge between March and May.
The recipe is for four people.
The lecture will be given in English with slides.
He works at the depot and cycles there.
The password must have eight characters.
I had a sandwich at my desk and answered mails.
The path follows the river as far as the mill.
The new timetable begins on the first of the month.
Our flat has two rooms and a cellar.
The box holds sixty screws of two sizes.
""",
}
SPLITS = {"train": (0, 18, 260), "validation": (18, 24, 70), "test": (24, 30, 70)}
"""Split to the first and the last of its sentences, and its number of texts."""
NUM_EMOTIONS = (0, 1, 1, 1, 2, 2, 3)
"""How many emotions a text has, each as likely as another."""


def write_split(path: Path, first: int, last: int, num_texts: int) -> None:
    """Write the texts of a split, each different."""
    draw = random.Random(f"emotions {first}")
    emotions = [name for name in SENTENCES if name]
    pools = {}
    for name, text in SENTENCES.items():
        pools[name] = text.strip().splitlines()[first:last]
    decks: dict[str, list[str]] = {name: [] for name in pools}
    written: dict[str, list[str]] = {}
    while len(written) < num_texts:
        chosen = draw.sample(emotions, draw.choice(NUM_EMOTIONS))
        parts = list(chosen)
        if not chosen or draw.random() < 0.35:
            parts.append("")
        if not chosen and draw.random() < 0.5:
            parts.append("")
        draw.shuffle(parts)
        sentences = []
        for part in parts:
            if not decks[part]:
                decks[part] = draw.sample(pools[part], len(pools[part]))
            sentences.append(decks[part].pop())
        if len(set(sentences)) == len(sentences):
            written[" ".join(sentences)] = [name for name in emotions if name in chosen]
    lines = []
    for text, labels in written.items():
        lines.append(json.dumps({"text": text, "emotions": labels}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write the three splits into the folder that the command line names."""
    folder = Path(sys.argv[1])
    for name, sentences in SENTENCES.items():
        assert len(set(sentences.strip().splitlines())) == 30, name
    for role, (first, last, num_texts) in SPLITS.items():
        write_split(folder / f"{role}.jsonl", first, last, num_texts)


if __name__ == "__main__":
    main()
