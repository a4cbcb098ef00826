"""Exact arithmetic: everything between the bits and (mu, sigma index), the same on every machine by construction.

    fixed.py       numbers on grids: rounding, limits, the exponential table
    arithmetic.py  FLOAT and FIXED: the operations of the entropy model's blocks, in real and in fixed-point numbers
    conv.py        convolutions whose weights are integers, and the back ends that compute them exactly
    proof.py       why no back end can lose a bit: bounds per output channel, checked whenever a model is loaded
    quantise.py    from trained float weights to integers, by calibration on real pictures

An activation is an integer in units of 1/256 with 16 bits, held in an ordinary float tensor, so that torch's own
kernels do the work. A weight is an integer times a power of two. As long as no sum of products needs more bits than
the float format has, every order of summation gives the same bits: that is what `proof` establishes, layer by layer.
The blocks in nn/ are written once; `arithmetic` decides how they count. With gradients enabled FIXED rounds in the
forward pass and lets gradients through as if it did not (straight-through), which is quantisation-aware training.
"""
