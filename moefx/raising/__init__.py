"""Hand-written MoE blocks, recognised by what they compute and proven by running both forms.

    record    run a copy of the block on random inputs and note every torch function it calls, with the values
    bank      parameters that come once per expert
    reading   ways to read a bank: which is gate, up and down, layout, activation
    choices   which recorded values may choose experts for tokens
    fit       which recorded tensor is a weighted sum of experts' outputs
    explain   where its coefficients come from, and which choices were dropped
    capacity  how many rows an expert keeps of any number of tokens
    slice     what remains of the block without the experts' own code
    align     one program out of runs of different sizes
    replay    that program as a forward with `moefx.experts` in it
    certify   original and raised block side by side: outputs, gradients, buffers, random numbers

`block` goes through these, `find` says which modules of a model to try, `probe` and `draw` make inputs and copies.

What is not raised is explained by `nearest` (with `parts` and `pattern`, by value) and `outline` (by structure).
Captured graphs go another way to the same `fit`: `colour` and `refine` group parameters, `stretch` runs a region,
`patch` makes and proves what replaces it, `splice` puts it in.
"""
