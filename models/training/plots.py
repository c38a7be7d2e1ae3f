"""The plots of corpus.py: what happens in each kind of story, in beats.

A plot is (beats, summary, questions and answers, moral). One beat a line; "?" marks a beat that is
sometimes left out, and an empty line a place where a new paragraph may begin. The notation is corpus.say()'s.
"""

OPEN = (
    "[Once upon a time, there was|There once was|In a small village, there was|Long ago, there was] {a.trait_an} {a.kind} [named|called] {a}."
    "|{a} was {a.trait_an} {a.kind} who lived [near|not far from|close to] {home}."
    "|Everyone [near|around] {home} knew {a}, {a.trait_an} [little|young|] {a.kind}."
    "|[Near|Not far from] {home} lived {a}, {a.trait_an} {a.kind}."
    "|This is a story about {a}, {a.trait_an} {a.kind}."
)
DAY = "[One [day|morning|afternoon|evening]|One {day}|On {day} morning|One [spring|summer|autumn|winter] day|Early one morning]"
GLAD = "[happy|glad|proud|full of joy|very happy|pleased]"
SAD = "[sad|worried|unhappy|upset|ready to cry]"
SAID = "[said|asked|called|whispered]"

# Each story: beats one per line ("?" = sometimes left out, blank = new paragraph), a summary, questions, a moral.
STORIES = {
    "lost": (
        """{a} had {o.an}[, and {a.he} took it everywhere| that {a.he} loved very much|. It was a present from {a.his} [grandmother|uncle|aunt|father]|, and it was {a.his} favourite thing].

%DAY%, {a} went to {p} [with the {o.n}|to play|to look for [stones|flowers|birds]|to meet a friend]. {sky}.
[When {a.he} wanted to go home, the {o.n} was gone.|On the way back, {a} [reached for|looked for] the {o.n}, but it was not there.|But when {a.he} looked down, the {o.n} was missing.]
["Oh no!" [cried|said] {a}. "Where is my {o.n}?"|{a} was %SAD%.|{a} looked [everywhere|left and right], but [found nothing|could not see it].|"I have lost my {o.n}," said {a}, and {a.his} voice shook.]

?{a} looked {s2}, but there was [nothing there|only [a stone|a snail|an old sock|a wet leaf]].
[Then|Just then|After a while], {b.intro} came [by|along|down the road]. "[Why are you sad|What is the matter|What are you looking for|What is wrong]?" asked {b}.
"I [lost|cannot find] my {o}," said {a}. "[Can you help me?|Have you seen it?|I had it this morning.]"
"[Let us look together|Do not worry|I have good eyes]," said {b}. "[When did you last have it?|Two can see more than one.|We will find it.]"
They [walked|went] [slowly|] back to {p} and looked [at every step|all around|carefully].
[At last, {b} [pointed|shouted]. "[Look|There]!"|Suddenly {b} stopped.|Soon {a} saw something {o.adj}.] The {o.n} was [lying|] {s1}.

{a} [picked up the {o.n}|took the {o.n}] and [held it tight|hugged it|danced with joy]. ["Thank you, {b}!" {a.he} said.|{a} thanked {b} again and again.]
[{a} was %GLAD%.|From that day on, {a} [always kept the {o.n} in a safe place|took better care of the {o.n}].|They walked home together, and both were %GLAD%.]""",
        "{a} lost {o.an} {p.at}, and {b} helped {a.him} find it {s1}.",
        [
            ("What did {a} lose?", "{a} lost {o.an}."),
            ("Who helped {a}?", "{b} helped {a}."),
            ("Where was the {o.n}?", "The {o.n} was {s1}."),
            ("Where did {a} go?", "{a} went to {p}."),
        ],
        "help",
    ),
    "block": (
        """{a} wanted to [go to|visit|get to] {p} [to see {a.his} [cousin|grandmother|old friend]|because there was [music|a fair|a puppet show] there|to bring home {o.an}].
%DAY%, {a.he} [packed some bread and|put on {a.his} hat and|said goodbye and] set off. {sky}.
?{a} walked past [a field of wheat|a row of trees|an empty house|a sleeping cow].
But [after a mile|half way|soon] {a.he} had to stop, because {block}.

{a} {tried}.
["What shall I do now?" said {a}.|{a} sat down on a stone. {a.He} was %SAD%.|"I will never get to {p}," said {a}.]
[Just then|After some time|A little later], {b.intro} came along with {tool}.
"[Good day|Hello], {a.kind2}! [Why do you sit here|Where are you going]?" asked {b}.
"I want to go to {p}, but {block}," [said|answered] {a}.
"[That is no problem|I can help with that|Then it is good that I am here]," said {b}. [With a smile,|Quickly,|Then] {b.he} {fix}.

"[How clever|Thank you so much|That was quick]!" said {a}. [{a} [shared {a.his} bread with {b}|gave {b} half of {a.his} bread].|They went on together.|{a} shook {b}'s hand.]
[Before [sunset|noon|dark]|In the end|At last], {a} came to {p}, and {a.he} was %GLAD%.""",
        "{a} could not get to {p} because {block}, but {b} helped with {tool}.",
        [
            ("Where did {a} want to go?", "{a} wanted to go to {p}."),
            ("Why did {a} have to stop?", "{a} had to stop because {block}."),
            ("Who helped {a}?", "{b} helped {a}."),
            ("What did {b} have?", "{b} had {tool}."),
        ],
        "help",
    ),
    "share": (
        """{a} and {b} were [good|best|old] friends. They [played together every day|did everything together|lived next door to each other].
%DAY%, they found {o.an} {p.at}. {sky}.
"[It is mine|I want it|I saw it first]!" [said|shouted] {a}.
"No, [it is mine|I saw it first|I picked it up]!" [said|shouted] {b}.
[{a} pulled on one side, and {b} pulled on the other.|They pulled and pulled.|Neither of them would let go.] [Crack! The {o.n} [broke|came apart] in the middle.|Then the {o.n} fell into the mud.|Both fell down, and the {o.n} flew into a bush.]

[They both went home angry.|{a} went home one way, and {b} went the other way.|They did not speak for [two|three] days.] [At home, {a} had nobody to play with.|Without a friend, the evening was very long.|{a} felt lonely and %SAD%.]
?"It was only {o.an}," thought {a}. "{b} is my friend."
The next [day|morning], {a} went to see {b}. "I am sorry," said {a}. "[I was selfish|I should not have shouted|A {o.n} is not worth a fight]."
"I am sorry too," said {b}. "[Let us fix it together.|We can take turns.|I missed you.]"
[They worked all afternoon, and the {o.n} was soon as good as new.|They cleaned the {o.n} until it looked like new.] After that, {a} had it one day, and {b} had it the next.
[Both of them were %GLAD%.|And they never fought about it again.|It was more fun that way.]""",
        "{a} and {b} fought over {o.an}, but then they said sorry and shared it.",
        [
            ("What did they find?", "They found {o.an}."),
            ("Where did they find the {o.n}?", "They found it {p.at}."),
            ("Who said sorry first?", "{a} said sorry first."),
            ("Why did they fight?", "They fought because both wanted the {o.n}."),
        ],
        "share",
    ),
    "rescue": (
        """%DAY%, {a} was walking [near|past] {p}. {sky}.
[Suddenly {a.he} heard a [small|weak|sad] [sound|cry].|Then something moved.|{a} heard a noise and stopped.] {animal_an} was stuck {stuck}.
["You poor thing," said {a}.|"Do not be afraid," said {a} softly.|The {animal} looked at {a} with big eyes.] [{a.He} tried to reach it, but {a.he} could not.|{a} tried [once and then again|with both hands], but it was no use.]
?{a} [called for help, but nobody came|looked around, but nobody was near].

So {a} [ran|hurried] to {b.intro} and told {b.him} [everything|what had happened]. "[Take this|This will help|You need this]," said {b}, and gave {a} {tool}.
[Together they ran back.|{a} ran back as fast as {a.he} could.|{b} came along to help.] {a} {free}.
The {animal} was [tired|dirty|a bit thin], but it was not hurt. [{a} gave it some [water|food].|{a} stroked it gently.|{b} wrapped it in a warm cloth.]

[The next day, the {animal} came to {a}'s door.|From that day, the {animal} followed {a} everywhere.|A week later, {a} saw the {animal} again, and it was [strong|well] and fat.] [{a} named it {pet}.|{a} was %GLAD%.|"I think it is saying thank you," said {b}.]""",
        "{a} found {animal_an} stuck {stuck} and saved it with {tool}.",
        [
            ("What animal did {a} find?", "{a} found {animal_an}."),
            ("Where was the {animal} stuck?", "The {animal} was stuck {stuck}."),
            ("Who gave {a} {tool}?", "{b} gave {a} {tool}."),
            ("How did {a} save it?", "{a} {free}."),
        ],
        "help",
    ),
    "make": (
        """{a} wanted to make {product_an} for [the village feast|{a.his} mother's birthday|a sick friend|{b}].
{a.He} needed {i1}, {i2} and {i3}. {a} had {i1} and {i2}, but [there was no {i3}|{a.he} could not find any {i3}|the {i3} had run out].
?"Without {i3} it will not work," said {a}.

So %day%, {a} went to {src} to see {c.intro}. {sky}.
"[Good morning|Hello], {c}. [May I have some {i3}?|Could you give me some {i3}?|I need some {i3}.]" [said|asked] {a}.
"[Of course|Yes|Gladly]," said {c}, "but first you must help me {chore}."
{a} [worked hard|rolled up {a.his} sleeves|did not complain] and {chored}. {c} was [pleased|happy] and gave {a.him} [a bag full|a good basket|plenty] of {i3}.

Back at home, {a} [worked until dark|worked all afternoon|set to work at once]. [{b.Intro} came to help.|{b.Intro} looked in and offered to help.|At the door stood {b.intro}, who wanted to help.] [Soon the {product} was ready.|At last the {product} was done.]
["It is the best {product} I have ever seen," said {b}.|Everybody [said it was very good|clapped their hands].] {a} was %GLAD%[, and a little tired|].""",
        "{a} wanted to make {product_an} and worked for {c} to get {i3}.",
        [
            ("What did {a} want to make?", "{a} wanted to make {product_an}."),
            ("What was missing?", "There was no {i3}."),
            ("Who gave {a} {i3}?", "{c} gave {a} {i3}."),
            ("What did {a} do for {c}?", "{a} {chored}."),
        ],
        "wait",
    ),
    "deliver": (
        """%DAY%, {c.intro} gave {a} {o.an}. "[Please take this to {b} {p.at}|Bring this to {b} {p.at}, please]," said {c}. "[And be careful with it!|Do not drop it.|It is important.]"
"[I will|You can trust me|I promise]," said {a}, and off {a.he} went. {sky}.
?On the way, {a} met [an old dog|a friend|a flock of geese], but {a.he} did not stop to play.
[Half way there|After a while|Near the old oak], [dark clouds came up and it began to pour|a strong wind came up|a great storm began]. {a} [put the {o.n} under {a.his} coat|held the {o.n} tight|hid the {o.n} in {a.his} bag] and [waited in an empty barn|ran to a hollow tree|stood under a bridge] until it was over.
?"A little [rain|wind] will not stop me," said {a}.

[It was almost dark when|Tired and wet,|With muddy shoes,] {a} came to {p}. "Here is {o.an} from {c}," {a.he} said.
{b} [opened the door and laughed with joy|was very surprised|could not believe it]. "[I have waited for this all week|You came through that storm for me|What a brave {a.kind} you are]!" [{b.he} said|said {b}].
{b} gave {a} [hot soup and a place by the fire|a warm drink and a big piece of cake|dry socks and a bowl of soup]. [{a} was %GLAD%.|{a} slept well that night.|On the way home, {a} sang all the way.]""",
        "{a} carried {o.an} from {c} to {b} {p.at} through a storm.",
        [
            ("What did {a} carry?", "{a} carried {o.an}."),
            ("Who gave {a} the {o.n}?", "{c} gave {a} the {o.n}."),
            ("Who was the {o.n} for?", "The {o.n} was for {b}."),
            ("Where was {b}?", "{b} was {p.at}."),
        ],
        "try",
    ),
    "learn": (
        """{a} could not {skill}. All {a.his} friends could {skill}, and that made {a.him} %SAD%.
%DAY%, {a} went to {p} to [try it alone|practise where nobody could see]. {sky}. {a} tried, but {a.he} {flop}.
["I will never learn it," said {a}.|{a} wanted to give up.|Some crows laughed in the trees.] [{a.He} sat down and sighed.|{a.His} face was red.]

{b.Intro} had seen it all. "[I was no better at first|Everyone starts like that|Do not give up]," said {b}. "[Listen|Here is a trick|Let me tell you a secret]: {tip}."
{a} tried again. [It was a little better.|This time it almost worked.|It was still hard, but not as hard as before.]
[Every day|Every morning|Day after day] {a} practised, and {b} [helped|watched|clapped].
?One day it rained, but {a} practised all the same.

[On the day of the fair|When {day} came|After two weeks], {a} {win}. [Everyone cheered.|"I knew you could do it," said {b}.|{b} cheered loudest of all.] {a} was %GLAD%.""",
        "{a} learned to {skill} with the help of {b}.",
        [
            ("What did {a} want to learn?", "{a} wanted to learn to {skill}."),
            ("Who helped {a}?", "{b} helped {a}."),
            ("What happened when {a} first tried?", "{a} {flop}."),
            ("What did {b} tell {a}?", "{b} said: {tip}."),
        ],
        "try",
    ),
    "gift": (
        """[Tomorrow was {b}'s birthday|It was almost {b}'s birthday|{b} was going to be [six|seven|eight|nine] years old], and {a} had no present.
{a} [had no money|had only one small coin|looked in {a.his} box, but it was empty]. "What can I give {b}?" {a.he} [thought|wondered].
%DAY%, {a.he} asked {c.intro}, who was {p.at}. {sky}. "What does {b} like best?" asked {a}.
"{b} once told me about {o.an}," said {c}. "[But you do not have to buy it.|I have an old one that needs some care.|Perhaps you can make one.]"
So {a} [worked all night|worked for hours] and [made|finished] {o.an} [with {a.his} own hands|out of scraps and bits|with a little help from {c}].
?It was not perfect, but it was made with love.

[The next day|On the birthday|In the morning], {a} [knocked at {b}'s door|went to {b}'s house] with {a.his} hands behind {a.his} back. "Happy birthday, {b}!" said {a}.
{b} opened the [paper|box|parcel] and [gasped|smiled from ear to ear|jumped up and down]. "{o.An}! [How did you know?|It is just what I wanted!|You made this yourself?]"
["It is the best present of all," said {b}.|{b} hugged {a} for a long time.] [Then they ate cake together.|Both of them were %GLAD%.|And {a} was even happier than {b}.]""",
        "{a} had no money, so {a.he} made {o.an} for {b}'s birthday.",
        [
            ("Whose birthday was it?", "It was {b}'s birthday."),
            ("What did {a} make?", "{a} made {o.an}."),
            ("Who did {a} ask for advice?", "{a} asked {c}."),
            ("Where was {c}?", "{c} was {p.at}."),
        ],
        "share",
    ),
    "fear": (
        """[One night|Late one evening|One dark night], {a} was [lying in bed|sitting alone by the fire|reading by a candle] when {a.he} [noticed|became aware of] {scare}.
{a.His} heart [beat fast|began to pound]. ["What if it is a monster?" {a.he} thought.|{a.He} pulled the blanket over {a.his} head.|{a.He} did not dare to move.]
?{a} held {a.his} {o} tight and waited, but it did not stop.
In the morning, {a} told {b.intro} about it. {sky}. ["We have to see what it is," said {b}.|"Tonight I will stay with you," said {b}.|{b} did not laugh. "Let us find out," {b.he} said.]

When night came, they [took a lamp|lit a candle] and [crept|tiptoed|walked slowly] [closer|nearer], hand in hand. There it was again: {scare}!
[{a} wanted to run away, but {b} held the light up.|"One, two, three!" said {b}, and {a} lifted the lamp.] [It was no monster at all.|And what did they see?] It was only {truth}.
[They laughed until their sides hurt.|"[And I was afraid of that|Is that all]!" said {a}, and they both laughed.] After that, {a} [slept well|was not afraid any more|told the story to everyone {p.at}].""",
        "{a} was afraid of {scare}, but with {b} {a.he} found out it was only {truth}.",
        [
            ("What was {a} afraid of?", "{a} was afraid of {scare}."),
            ("What was it really?", "It was only {truth}."),
            ("Who stayed with {a}?", "{b} stayed with {a}."),
        ],
        "fear",
    ),
    "plant": (
        """%DAY%, {c.intro} gave {a} a [tiny|small|brown|dry] seed. "[Plant it and be patient|Take good care of it|It does not look like much, but wait]," said {c}.
{a} planted the seed [near|not far from] {p}[ and gave it some water|]. {sky}.
[Every morning {a} looked, but there was nothing to see.|{a} waited one day, then two days, then a week.|For a long time nothing happened.] "[Maybe it is asleep|Is it ever going to grow]," said {a}.
Then a [little|tiny] green leaf came out. [{a} jumped for joy.|{a} told everybody about it.]

But [one day|then|soon] {plague}. [{a} was %SAD%.|"My poor plant!" said {a}.] So {a.he} {cure}. {b.Intro} [helped {a.him}|came to help].
?It was hard work, but they did not stop.
[Weeks went by.|The days grew longer.|Slowly, slowly, it grew.] [By the end of summer|One fine morning|In the end], the {plant} {grown}.
{a} [invited everyone to see it|ran to show {c}|shared it with {b}]. ["You see," said {c}, "you only had to wait."|{c} nodded and smiled.] {a} was %GLAD%.""",
        "{a} planted a seed from {c}, took good care of it, and it became a fine {plant}.",
        [
            ("Who gave {a} the seed?", "{c} gave {a} the seed."),
            ("Where did {a} plant it?", "{a} planted it near {p}."),
            ("What grew from the seed?", "A {plant} grew from the seed."),
            ("What did {a} do about the problem?", "{a} {cure}."),
        ],
        "wait",
    ),
    "honest": (
        """%DAY%, {a} broke {c}'s {o} {how}. {sky}.
[Nobody had seen it.|There was nobody else in the room.|{a} was all alone.] {a} [quickly hid it {s1}|put the pieces {s1}] and ran [home|away|outside].
["Nobody will ever know," thought {a}.|{a} tried not to think about it.] But [{a.he} could not eat|{a.his} stomach hurt|{a.he} could not sleep] that night.
?In {a.his} dreams the {o.n} had a face, and it looked at {a.him}.

The next day, {c} [was sad|asked everyone|looked everywhere]. "Has anyone seen my {o.n}?" asked {c}, who was a {c.job}. [{b} was standing there, and some people began to look at {b.him}.|"Maybe it was {b}," said somebody.]
{a} [could not bear it any longer|took a deep breath|stepped forward]. "It was me," [{a.he} said|said {a}]. "I broke it {how}. I am [so|very|truly] sorry."
[{c} was silent for a moment.|It was very quiet.] "[Thank you for telling me|I am glad you told the truth|That was brave of you]," said {c}. "[You can help me mend it.|We will mend it together.]"
So {a} [worked every day after school|worked all week|came every afternoon] until the {o.n} was [whole again|mended]. [{a}'s heart was light again.|And {a} was %GLAD%.|{b} came to help, too.]""",
        "{a} broke {c}'s {o}, but {a.he} told the truth and helped to mend it.",
        [
            ("What did {a} break?", "{a} broke {c}'s {o}."),
            ("How did {a} break it?", "{a} broke it {how}."),
            ("Where did {a} hide it?", "{a} hid it {s1}."),
            ("Whose {o.n} was it?", "It was {c}'s {o.n}."),
        ],
        "truth",
    ),
    "contest": (
        """There was going to be a {contest} {p.at}, and the prize was {o.an}. {a} wanted to win it [more than anything|very much].
[{a} got ready all week.|Every day, {a} practised.|{a} could think of nothing else.] {b.Intro} wanted to win it, too.
[On the day of the {contest}|When the day came], [many people came to watch|everyone was there|the whole village came]. {sky}. "[Ready, steady, go|Let it begin]!" called {c.intro}.
[{a} and {b} were ahead of all the others.|Soon only {a} and {b} could still win.|{a} was doing very well.] Then {b}'s {mishap}. [{b} was %SAD%.|"Oh no!" cried {b}.]
[{a} could have won easily now.|"Now I can win," thought {a}, but it did not feel right.|For a moment {a} did not know what to do.] But {a.he} {aid}.

In the end, [somebody else won|{b} won|a small mouse won|nobody knew who had won]. [{a} did not mind.|{a} clapped anyway.|{a} shrugged and smiled.]
[Then {c} called {a} up. "There is a second prize today, for the kindest heart," {c.he} said.|"[The {o.n} is for both of you|I have seen what you did]," said {c}, and everyone cheered.|"You are a true friend," said {b}, and took {a}'s hand.] {a} was %GLAD%.""",
        "{a} wanted to win the {contest}, but {a.he} stopped to help {b}.",
        [
            ("What was the prize?", "The prize was {o.an}."),
            ("What kind of contest was it?", "It was a {contest}."),
            ("Where was the {contest}?", "The {contest} was {p.at}."),
            ("What went wrong for {b}?", "{b}'s {mishap}."),
        ],
        "help",
    ),
    "swap": (
        """{a} had {x.an}, but {a.he} wanted {o.an} [more than anything|for a long time].
%DAY%, {a} went to {p}. {sky}. There {a.he} met {b.intro}. {b} had {y.an}. "I need {x.a_n} {need1}," said {b}. "[Will you swap|Shall we swap]?"
"[Why not|Yes|All right]," said {a}, and gave {b} the {x.n}. Now {a} had {y.an}.
?"Maybe it will bring me luck," said {a}.

A little later, {a} met {c.intro}. {c} looked [tired|troubled|cross]. "If only I had {y.a_n} {need2}," said {c}.
"I have one here," said {a}. "[What would you give me for it?|What do you have?]"
"[Only this|Nothing but this]," said {c}, and held up {o.an}. {a} [could not believe {a.his} eyes|almost jumped into the air]. They swapped at once.

So {b} got {x.an}, {c} got {y.an}, and {a} got {o.an}. [Everybody was %GLAD%.|It was a good day for all three.|And nobody had paid a single coin.]""",
        "{a} swapped {x.an} for {y.an} and then {y.an} for {o.an}.",
        [
            ("What did {a} have at first?", "At first {a} had {x.an}."),
            ("What did {a} get from {b}?", "{a} got {y.an} from {b}."),
            ("What did {a} get from {c}?", "{a} got {o.an} from {c}."),
            ("Why did {b} need {x.a_n}?", "{b} needed it {need1}."),
        ],
        "share",
    ),
    "plans": (
        """{a} and {b} wanted to {play}. They had [talked about it|waited for it|made plans] all week.
But [on {day}|when they woke up|on the great day], everything was different. {sky}. "[We cannot {play} today|Now it will not work]," said {a}. {a.He} was %SAD%.
[They looked out of the window for a long time.|{b} was disappointed, too.|"It is not fair," said {b}.] {a} [played with {a.his} {o}|sat down next to {a.his} {o}] and said nothing.
?"There must be something else," said {b}.
Then {b} had an idea. [{b.He} whispered it into {a}'s ear.|"I know what we can do!" {b.he} said.] So they {instead}.
[It was so much fun that they forgot the time.|They laughed and laughed.|{c.Intro} came to see why they were laughing, and stayed.]
In the evening, {a} said, "[I am almost glad about the weather|This was even better than our plan|Let us do that again tomorrow]." [{b} thought so, too.|And {b} was %GLAD%.]""",
        "{a} and {b} could not {play} because it was {weather}, so they {instead}.",
        [
            ("What did they want to do?", "They wanted to {play}."),
            ("What was the weather like?", "It was {weather}."),
            ("What did they do instead?", "They {instead}."),
            ("Who had the idea?", "{b} had the idea."),
        ],
        "wait",
    ),
    "alone": (
        """{a} was new in the village. {a.He} [did not know anyone|had no friends yet] and was too shy to say hello.
%DAY%, {a} sat {p.at} with {a.his} {o} and watched the others play. {sky}. [{a} wished that someone would ask {a.him} to join.|Nobody saw {a.him}.|{a} felt lonely.]
Among them was {b.intro}, who was [trying to reach|looking for|chasing] a ball. The ball [rolled|flew] away and landed {s1}. [Nobody could find it.|They looked and looked.]
But {a} had seen it. [{a.He} got up, and {a.his} knees were shaking.|"It is {s1}," {a.he} said in a small voice.] {a} [brought the ball back|picked up the ball and held it out].
"[Thank you|Well done|You have good eyes]!" said {b}. "[What is your name?|Who are you?|Are you new here?]"
"I am {a}," said {a}. "[I live near {home}.|We have just come here.]"
?"I like your {o.n}," said {b}. "Can I see it?"
"[Do you want to play with us?|Come and play with us!]" said {b}. [They played until the sun went down.|They played all afternoon.] [When {a} went home, {a.he} had a friend.|That night {a} was too happy to sleep.|{a} was not lonely any more.]""",
        "{a} was new and lonely, but found a ball {s1} and made friends with {b}.",
        [
            ("Why was {a} lonely?", "{a} was new in the village."),
            ("What did {a} have?", "{a} had {o.an}."),
            ("Where did the ball land?", "The ball landed {s1}."),
            ("Who became {a}'s friend?", "{b} became {a}'s friend."),
        ],
        "help",
    ),
}
for _k, (_t, _s, _q, _m) in STORIES.items():
    for _n, _v in (
        ("%DAY%", DAY),
        ("%day%", "[one day|one morning|on {day}]"),
        ("%GLAD%", GLAD),
        ("%SAD%", SAD),
    ):
        _t = _t.replace(_n, _v)
    STORIES[_k] = (_t.split("\n"), _s, _q, _m)
