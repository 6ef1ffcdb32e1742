_base_ = './upernet_r18_1xb4-1k_fusion-shapes-128x128.py'
custom_hooks = [dict(type='ScaleEqualizerHook')]
