_base_ = './caa_r101-d16_4xb4-40k_pascal-context-59-513x513.py'
# DeepLab's ImageNet weights, as timm publishes them; they want images between -1 and 1.
checkpoint_file = 'https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/tf_xception_65-c9ae96e8.pth'
norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='AlignedXception',
        depth=65,
        output_stride=16,
        norm_cfg=norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)),
    decode_head=dict(attention='axial'))
