"""The words and little facts that corpus.py combines. Data only; a line of text is a line of code."""

# ruff: noqa: E501
# fmt: off
GIRLS = ("Ada Bea Cora Dina Elsa Faye Gwen Hana Ines June Kira Lila Mona Nina Olive Pia Rosa Sara Tess Uma "
         "Vera Wren Yara Zoe Anna Clara Edith Flora Greta Holly Ivy Jane Lucy Mia Nora Poppy Ruth Tilda").split()
BOYS = ("Abel Ben Cole Dan Eli Finn Gus Hugo Ivan Jude Karl Leo Max Ned Otto Paul Remy Sam Theo Umar "
        "Vic Will Yusuf Zack Arlo Bruno Colin Emil Felix Henry Jonas Luke Miles Noah Oscar Peter Ralf Tom").split()
SURNAMES = "Hale Dunn Marsh Pike Reed Stone Wood Brook Field Frost Lane Moss Nash Penn Rush Thorn".split()
SPECIES = "fox hare owl mouse hedgehog bear otter badger frog crow squirrel duck cat dog goat rabbit mole beaver".split()
TRAITS = ("brave shy clever kind curious careful quiet cheerful patient stubborn gentle honest lazy proud busy "
          "friendly clumsy hopeful merry sleepy bold").split()
COLOURS = "red blue green yellow white black brown orange purple golden silver pink grey".split()
SIZES = ["little", "big", "old", "new", "shiny", "wooden", "striped", "tiny", "round", "pretty"]
THINGS = ("kite ball drum boat doll bell whistle lantern umbrella hat scarf book map key coin ring spoon basket blanket "
          "cup mirror feather shell button ribbon box flute clock compass marble bucket mitten pencil puppet purse "
          "balloon wagon brush candle necklace").split()
PLACES = {"mill": "at", "river": "by", "bridge": "on", "market": "at", "meadow": "in", "forest": "in", "hill": "on",
          "lake": "by", "barn": "in", "garden": "in", "bakery": "at", "school": "at", "well": "by", "tower": "in",
          "harbour": "at", "orchard": "in", "library": "in", "cave": "in", "beach": "on", "square": "in", "farm": "on",
          "station": "at", "pond": "by", "park": "in"}
SPOTS = ["under a bench", "behind the door", "in the tall grass", "under a heap of leaves", "between two stones",
         "inside an old boot", "on a low branch", "under a cart", "behind a barrel", "next to a fence", "in a puddle",
         "beside the steps", "under a bush", "in an empty flower pot"]
JOBS = {"baker": "bakery", "miller": "mill", "farmer": "farm", "teacher": "school", "fisherman": "harbour",
        "gardener": "garden", "librarian": "library", "shepherd": "hill", "ferryman": "river", "carpenter": "barn",
        "postman": "station", "tailor": "market", "watchman": "tower", "beekeeper": "orchard"}
WEATHER = {
    "sunny": ["The sun was shining", "It was a bright, sunny day", "There was not a cloud in the sky"],
    "rainy": ["Rain was falling on the roofs", "It was a grey, rainy day", "It had been raining since dawn"],
    "windy": ["A strong wind was blowing", "It was a windy day", "The wind was pulling at every hat and coat"],
    "snowy": ["Snow was falling softly", "It was a snowy day", "The whole village was white with snow"],
    "foggy": ["A thick fog lay over the village", "It was a foggy day", "Fog hid the tops of the trees"],
    "cloudy": ["Grey clouds covered the sky", "It was a cloudy day", "The clouds hung low over the fields"],
    "frosty": ["Frost sparkled on every leaf", "It was a cold, frosty day", "The puddles were hard with ice"],
    "warm": ["The air was warm and still", "It was a warm day", "Even the stones were warm"]}
ASIDES = """{a} hummed a little tune.|{a} took a deep breath.|Somewhere a dog barked.|A bee flew past.|The church bell rang.
{a} thought about it for a while.|The grass smelled sweet.|Far away, a rooster was calling.|{a} looked up at the sky.|A leaf turned slowly in the air.
The shadows were getting long.|Two sparrows were chatting on a fence.|{a} counted to ten.|{a} rubbed {a.his} nose.|It was very quiet.|A cart rolled by.
{a} wondered what to do next.|Smoke was rising from the chimneys.|{a} kicked a small stone along the road.|A cat was asleep on a warm wall.
{a} smiled at the thought.|The road was dusty.|Nobody else was about.|{a} could smell fresh bread.|A door banged somewhere.|{a} stopped to listen.""".replace("\n", "|").split("|")
MORALS = {"help": ["A little help can go a long way.", "It is easier to do hard things together.", "A good friend is worth more than gold."],
          "truth": ["It is better to tell the truth, even when it is hard.", "The truth may be heavy, but a secret is heavier."],
          "share": ["Things are more fun when you share them.", "Half of a thing with a friend is better than all of it alone."],
          "try": ["If you keep trying, you get a little better every day.", "Nobody can do everything on the first day."],
          "fear": ["Things are less scary in the light.", "It helps to look before you run."],
          "wait": ["Good things take time.", "Some things cannot be hurried."]}
# Causes and what mends them: each row is a consistent little fact about the world.
BLOCKS = [("the bridge was broken", "tried to jump across, but the gap was too wide", "a long plank", "laid the plank across the gap"),
          ("the gate was locked", "pushed the gate with all [his|] strength, but it did not move", "a small key", "turned the key in the lock"),
          ("the river was too high", "put one foot in the water, but it was far too fast", "a little boat", "rowed them both across"),
          ("a fallen tree blocked the road", "pushed the tree, but it was much too heavy", "a strong rope", "tied the rope to the tree and pulled it aside"),
          ("it was too dark to see the path", "took a few steps and walked into a bush", "a bright lamp", "lit the lamp and showed the way"),
          ("a big goose stood in the way", "said shoo, but the goose only hissed", "a piece of bread", "threw the bread to one side, and the goose ran after it"),
          ("the path was covered with ice", "slipped and slid all the way back", "a bag of sand", "threw sand on the ice"),
          ("the wall was too high", "jumped, but could not reach the top", "a tall ladder", "leaned the ladder against the wall"),
          ("the road was deep in mud", "took one step and lost a shoe", "an armful of straw", "spread the straw over the mud"),
          ("a thick hedge had grown over the path", "pushed into the leaves, but the thorns were sharp", "a pair of shears", "cut a way through the hedge")]
STUCK = [("kitten", "up in a tall tree", "a ladder", "climbed up and carried it down"), ("duckling", "in a deep ditch", "a basket", "lifted it out with the basket"),
         ("lamb", "in the mud", "a rope", "pulled it out with the rope"), ("sparrow", "in a thorn bush", "thick gloves", "parted the thorns and set it free"),
         ("hedgehog", "in an old net", "scissors", "cut the net and set it free"), ("puppy", "at the bottom of a dry well", "a bucket on a rope", "pulled it up in the bucket"),
         ("rabbit", "under a fallen branch", "a saw", "cut the branch and set it free"), ("fish", "in a drying puddle", "a pail of water", "carried it back to the water in the pail"),
         ("calf", "behind a broken fence", "a hammer", "took the boards away and led it out"), ("butterfly", "inside a closed shed", "a long stick", "opened the high window with the stick")]
SKILLS = [("swim", "swallowed a lot of water", "move your arms slowly and breathe", "swam all the way across the pond"), ("whistle", "only made a wet sound", "put your tongue behind your teeth", "whistled a whole song"),
          ("ride a bicycle", "fell into a hedge", "look far ahead, not at your feet", "rode once around the square"), ("skate", "sat down hard on the ice", "bend your knees a little", "skated in a big circle"),
          ("bake bread", "made a loaf as hard as a stone", "let the dough rest for an hour", "baked a soft and golden loaf"), ("fly a kite", "tangled the string in a tree", "run into the wind and let the string go slowly", "made the kite dance above the roofs"),
          ("play the flute", "made all the cats run away", "blow softly, as if cooling soup", "played a tune without a mistake"), ("row a boat", "turned round and round", "pull both oars at the same time", "rowed straight to the other side"),
          ("read", "mixed up all the letters", "read one small word at a time", "read a whole page aloud"), ("juggle", "dropped every apple", "start with only two", "kept three apples in the air"),
          ("dance", "stepped on everybody's feet", "listen to the drum and count to four", "danced until the music stopped"), ("tie a knot", "ended up with tied fingers", "make a loop like a rabbit's ear", "tied a knot that held the boat"),
          ("paint", "made everything the colour of mud", "wash the brush each time", "painted a picture of the whole village"), ("climb", "slid down after one step", "find a place for your foot first", "climbed to the top of the old oak")]
FEARS = [("a scratching sound in the attic", "a family of mice"), ("a tall shadow on the wall", "a coat on a hook"), ("a long howl in the night", "the wind in the chimney"),
         ("two yellow eyes in the dark", "the baker's cat"), ("a knocking at the window", "a branch of the old apple tree"), ("a white shape in the garden", "a sheet on the washing line"),
         ("a deep growl behind the door", "an old dog snoring"), ("a strange light on the hill", "the shepherd with a lamp"), ("a heavy step on the stairs", "a goat that had come in from the rain"), ("a hissing sound in the kitchen", "a kettle on the stove")]
RECIPES = {"apple pie": ("apples", "flour", "butter"), "vegetable soup": ("carrots", "onions", "potatoes"), "honey bread": ("flour", "honey", "milk"), "carrot cake": ("carrots", "eggs", "flour"),
           "berry jam": ("berries", "sugar", "lemons"), "birdhouse": ("boards", "nails", "paint"), "paper lantern": ("paper", "glue", "candles"), "wool blanket": ("wool", "thread", "buttons"), "plum cake": ("plums", "eggs", "sugar"), "rag doll": ("cloth", "thread", "buttons")}
SOURCES = {"apples": "gardener", "flour": "miller", "butter": "farmer", "carrots": "gardener", "onions": "gardener", "potatoes": "farmer", "honey": "beekeeper", "milk": "farmer", "eggs": "farmer", "berries": "shepherd", "sugar": "baker", "lemons": "fisherman", "boards": "carpenter", "nails": "carpenter",
           "paint": "teacher", "paper": "librarian", "glue": "teacher", "candles": "watchman", "wool": "shepherd", "thread": "tailor", "buttons": "tailor", "plums": "beekeeper", "cloth": "tailor"}
CHORES = [("sweep the floor", "swept the floor"), ("feed the hens", "fed the hens"), ("carry the water", "carried the water"), ("stack the wood", "stacked the wood"), ("wash the windows", "washed the windows"), ("rake the leaves", "raked the leaves"), ("brush the donkey", "brushed the donkey")]
PLANTS = {"sunflower": "was taller than the fence", "pumpkin": "was as big as a chair", "bean": "climbed up to the roof", "tomato": "was covered with red fruit", "rose": "opened its first flower", "strawberry": "was full of sweet berries", "apple tree": "gave three round apples", "cabbage": "was as wide as a drum"}
PLAGUES = [("the ground was dry and cracked", "carried water from the well every morning"), ("crows came to pick at the earth", "built a scarecrow out of an old coat"), ("weeds grew all around it", "pulled out the weeds one by one"), ("a cold night was coming", "covered it with warm straw"), ("snails were eating the leaves", "carried the snails to the far side of the wood")]
CONTESTS = [("boat race", "boat began to leak", "lent {b.him} a cork to stop the hole"), ("running race", "shoe came off", "stopped and helped {b.him} tie it"), ("kite contest", "string snapped", "gave {b.him} half of the spare string"), ("cake contest", "oven went cold", "let {b.him} use {a.his} oven"), ("singing contest", "voice went hoarse", "gave {b.him} tea with honey"), ("snowman contest", "snowman fell over", "helped {b.him} build it again"), ("spelling contest", "pencil broke", "lent {b.him} a pencil")]
BREAKS = [("vase", "while playing with a ball"), ("window", "while throwing stones"), ("plate", "while running through the kitchen"), ("clock", "while looking at the little wheels"), ("teapot", "while reaching for a biscuit"), ("chair", "while jumping up and down"), ("fence", "while climbing over it"), ("lamp", "while dancing in the hall")]
PLAY = [("fly a kite", "rainy", "painted pictures by the window"), ("swim in the lake", "frosty", "skated on the hard ice"), ("have a picnic", "rainy", "put a blanket on the floor and had the picnic inside"), ("pick berries", "foggy", "told each other stories by the fire"), ("sail a paper boat", "snowy", "built a snowman with a carrot nose"), ("play cards on the grass", "windy", "ran up the hill and let the wind push them"), ("look at the stars", "cloudy", "made paper stars and hung them up"), ("build a snow house", "warm", "built a house out of hay"), ("skate on the pond", "sunny", "sailed little boats on the pond")]
NEEDS = [("to catch rain from the roof", "bucket"), ("to wake up early", "clock"), ("to call the sheep", "whistle"), ("to keep the sun away", "hat"), ("to carry eggs", "basket"), ("to find the way home", "compass"), ("to see in the cellar", "lantern"), ("to stay dry", "umbrella"), ("to eat soup", "spoon"), ("to keep warm", "scarf"), ("to open an old chest", "key"), ("to write a letter", "pencil"), ("to play at the dance", "flute"), ("to carry wood", "wagon")]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
# Instruction data. Each task returns (kind, prompt, answer, key); key decides whether it is held out.
ANIMALS = {  # kind: (home, food, sound or habit, legs, colour)
    "fox": ("in a den", "mice", "barks at night", 4, "red"), "owl": ("in a hollow tree", "mice", "hoots", 2, "brown"), "hare": ("in the fields", "grass", "runs very fast", 4, "grey"),
    "hedgehog": ("under the hedge", "snails", "rolls into a ball", 4, "brown"), "bear": ("in a cave", "honey", "growls", 4, "brown"), "otter": ("by the river", "fish", "swims on its back", 4, "brown"),
    "frog": ("in the pond", "flies", "croaks", 4, "green"), "crow": ("in the tall oak", "corn", "caws", 2, "black"), "squirrel": ("in the oak tree", "nuts", "climbs trees", 4, "red"),
    "duck": ("on the pond", "water plants", "quacks", 2, "white"), "cat": ("in the bakery", "fish", "purrs", 4, "grey"), "dog": ("in the yard", "bones", "barks", 4, "black"),
    "cow": ("in the barn", "grass", "moos", 4, "brown"), "sheep": ("on the hill", "grass", "bleats", 4, "white"), "hen": ("in the henhouse", "seeds", "clucks", 2, "white"),
    "mole": ("under the ground", "worms", "digs tunnels", 4, "black"), "bee": ("in a hive", "nectar", "buzzes", 6, "yellow"), "spider": ("in a web", "flies", "spins webs", 8, "black"), "mouse": ("in the mill", "cheese", "squeaks", 4, "grey")}
WORDS = {"animal": list(ANIMALS), "toy": ["kite", "ball", "doll", "puppet", "marble", "drum", "top"], "food": ["bread", "cheese", "honey", "soup", "apple", "cake", "carrot"],
         "place": ["mill", "river", "market", "forest", "barn", "library", "harbour"], "colour": COLOURS[:8], "clothing": ["hat", "scarf", "mitten", "coat", "shoe", "sock"]}
OPPOSITES = "big small|hot cold|happy sad|fast slow|up down|old new|day night|open closed|loud quiet|wet dry|full empty|early late|high low|hard soft|light dark|near far|good bad|first last|left right|long short".split("|")
VERBS = [("walks", "walked", "walk"), ("plays", "played", "play"), ("looks", "looked", "look"), ("works", "worked", "work"), ("sings", "sang", "sing"), ("sleeps", "slept", "sleep"), ("waits", "waited", "wait"), ("runs", "ran", "run"), ("sits", "sat", "sit"), ("reads", "read", "read")]
UNKNOWN = ["What is the capital of {x}?", "Who was the first king of {x}?", "How far away is {x}?", "Can you write a computer program about {x}?", "What is the price of {x}?", "Tell me the news about {x}.", "How many people live in {x}?", "What language do they speak in {x}?"]
FAR = "France Japan Brazil Egypt Canada London Paris Berlin Rome America China India Mars gold oil physics chemistry football".split()
SYSTEM = ["You are a helpful assistant.", "You are a friendly storyteller.", "You answer in few words.", "You are Tales, a small language model."]
