from torch import nn


class PlainNet(nn.Module):
    """A network that knows nothing of nnU-Net: no encoder, no decoder, one output."""

    def __init__(self, in_channels, out_channels, features=6, dims=3):
        super().__init__()
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.body = nn.Sequential(
            conv(in_channels, features, 3, padding=1), nn.ReLU(), conv(features, features, 3, padding=1), nn.ReLU()
        )
        self.head = conv(features, out_channels, 1)

    def forward(self, x):
        return self.head(self.body(x))
