_base_ = './fcn_r101-d8_4xb2-80k_cityscapes-512x1024.py'
# Before the first step: each fusion convolution's weights divided by the scale of their branch.
custom_hooks = [dict(type='ScaleEqualizerHook')]
