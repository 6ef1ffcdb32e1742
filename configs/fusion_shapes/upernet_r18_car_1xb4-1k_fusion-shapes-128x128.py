_base_ = './upernet_r18_1xb4-1k_fusion-shapes-128x128.py'
model = dict(type='CAREncoderDecoder', car=dict(channels=64, pool=2))
