_base_ = './ocrnet_hr48_4xb4-30k_pascal-context-59-513x513.py'
# Class-aware regularization in the place of the convolution behind the object context,
# object_context_block.bottleneck.
model = dict(type='CAREncoderDecoder', car=dict(pool=2))
