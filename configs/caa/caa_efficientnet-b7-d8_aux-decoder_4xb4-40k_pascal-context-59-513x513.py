_base_ = './caa_efficientnet-b7-d8_aux_4xb4-40k_pascal-context-59-513x513.py'
# The features of output stride 4, 48 channels, join behind the attention, as in DeepLabV3+.
model = dict(decode_head=dict(c1_in_channels=48, c1_channels=48))
