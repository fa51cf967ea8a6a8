"""What no method can beat: models that know what a method cannot know, or leave nothing out.

For evaluation alone: a bound computes everything and then leaves out what counts least, so it saves
nothing; it says how much quality is lost by leaving out that much, were the choice free of error.
The dense parent is the bound that leaves nothing out.
"""
