_base_ = './upernet_swin-s_4xb4-160k_ade20k-512x512.py'
# Before the first step: each fusion convolution's weights divided by the scale of their branch.
custom_hooks = [dict(type='ScaleEqualizerHook')]
