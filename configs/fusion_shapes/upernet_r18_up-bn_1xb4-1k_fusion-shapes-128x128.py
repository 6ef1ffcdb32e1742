# Batch norm after upsampling, the naive alternative that scale equalization is compared with.
_base_ = './upernet_r18_1xb4-1k_fusion-shapes-128x128.py'
model = dict(
    decode_head=dict(
        type='BatchNormAfterUpsampling',
        head='UPerHead',
        layers=['fpn_bottleneck.conv'],
        branches=['fpn_convs.0', 'fpn_convs.1', 'fpn_convs.2', 'bottleneck']))
