_base_ = './upernet_lite0_1xb4-1k_camvid-180x240.py'
custom_hooks = [dict(type='ScaleEqualizerHook')]
