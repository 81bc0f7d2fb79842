"""Hand-written MoE blocks, recognised by what they compute and proven by running both forms.

    record   run a copy of the block on random inputs and note every torch function it calls, with the values
    bank     parameters that come once per expert
    fit      which recorded tensor is a weighted sum of experts' outputs, and how the parameters are read
    explain  where its coefficients come from, and which choices were dropped
    slice    what remains of the block without the experts' own code
    align    one program out of runs of different sizes
    replay   that program as a forward with `moefx.experts` in it
    certify  original and raised block side by side: outputs, gradients, buffers, random numbers

`block` goes through these, `find` says which modules of a model to try, `probe` makes inputs and copies.
"""
